// A small pool of persistent threads that share out tickets 0 .. n-1 of one job at a time.
#pragma once

#include <stdint.h>

namespace bitlm {

using Work = void (*)(void* context, int64_t ticket);

// Calls work(context, t) once for each t in 0 .. tickets-1, on at most `threads` threads with the
// caller among them. A caller that finds the pool in use does all its tickets alone.
void run(int threads, int64_t tickets, Work work, void* context);

}  // namespace bitlm
