#include "cpu_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define BITLM_X86 1
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace bitlm {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the Python between two layers: waking a thread takes as long as a layer. After
// busy_spin a waiting thread offers its core to others at each look; when its time is over it sleeps.
constexpr auto busy_spin = std::chrono::microseconds(20);
constexpr auto worker_spin = std::chrono::microseconds(500);
constexpr auto caller_spin = std::chrono::microseconds(20);

void pause() {
#if defined(BITLM_X86)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

template <class Done>
bool spin(Clock::duration time, Done done) {
  const auto start = Clock::now();
  auto passed = start - start;
  do {
    for (int i = 0; i < 16; i++) {
      if (done()) return true;
      pause();
    }
    if (passed > busy_spin) std::this_thread::yield();
    passed = Clock::now() - start;
  } while (passed < time);
  return done();
}

class Pool {
 public:
  // Returns false when another caller has the pool.
  bool run(int threads, int64_t tickets, Work work, void* context) {
    if (!caller_.try_lock()) return false;
    std::lock_guard<std::mutex> held(caller_, std::adopt_lock);
    start_workers(threads - 1);
    work_ = work;
    context_ = context;
    tickets_ = tickets;
    next_.store(0, std::memory_order_relaxed);
#if defined(BITLM_X86)
    rounding_ = _mm_getcsr();
#endif
    uint64_t job = ((job_.load() >> 16) + 1) << 16 | static_cast<uint64_t>(threads - 1);
    open_.store(job);
    job_.store(job);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_workers_.notify_all();
    }
    take_tickets();
    // A worker that comes from now on finds the job closed: nobody waits for one that was late.
    open_.store(0);
    if (!spin(caller_spin, [this] { return active_.load() == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      waiting_.store(true);
      wake_caller_.wait(lock, [this] { return active_.load() == 0; });
      waiting_.store(false);
    }
    return true;
  }

 private:
  void start_workers(int wanted) {
    while (workers_ < wanted) {
      try {
        std::thread(&Pool::worker, this, workers_, job_.load()).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads do the same work
      }
      workers_++;
    }
  }

  void take_tickets() {
    int64_t ticket;
    while ((ticket = next_.fetch_add(1, std::memory_order_relaxed)) < tickets_) {
      work_(context_, ticket);
    }
  }

  void worker(int number, uint64_t seen) {
    for (;;) {
      auto changed = [&] { return job_.load() != seen; };
      if (!spin(worker_spin, changed)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_workers_.wait(lock, changed);
        sleeping_.fetch_sub(1);
      }
      seen = job_.load();
      if (number >= static_cast<int>(seen & 0xffff)) continue;
      // Counted first, then looked: the caller closes the job first and then reads the count, so
      // one of the two sees the other.
      active_.fetch_add(1);
      if (open_.load() == seen) {
#if defined(BITLM_X86)
        _mm_setcsr(rounding_);  // as the caller rounds and flushes denormals
#endif
        take_tickets();
      }
      if (active_.fetch_sub(1) == 1 && waiting_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_caller_.notify_one();
      }
    }
  }

  std::mutex caller_;
  std::mutex mutex_;
  std::condition_variable wake_workers_, wake_caller_;
  std::atomic<uint64_t> job_{0}, open_{0};  // job number << 16 | workers it wants; 0: closed
  std::atomic<int> active_{0}, sleeping_{0};
  std::atomic<bool> waiting_{false};
  int workers_ = 0;
  Work work_ = nullptr;
  void* context_ = nullptr;
  int64_t tickets_ = 0;
  unsigned rounding_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
};

// Never destroyed: detached threads use it until the process ends.
std::atomic<Pool*> pool{nullptr};
std::once_flag made;

Pool& the_pool() {
  std::call_once(made, [] {
    pool = new Pool;
#if !defined(_WIN32)
    // A forked child has none of the threads, and its copies of the locks may be held.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
  });
  return *pool;
}

}  // namespace

void run(int threads, int64_t tickets, Work work, void* context) {
  if (threads > tickets) threads = static_cast<int>(tickets);
  if (threads > 0xffff) threads = 0xffff;
  if (threads > 1 && the_pool().run(threads, tickets, work, context)) return;
  for (int64_t ticket = 0; ticket < tickets; ticket++) work(context, ticket);
}

}  // namespace bitlm
