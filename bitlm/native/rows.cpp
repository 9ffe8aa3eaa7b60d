// Rows of the dense weight from a prepared one: embedding look-up, dequantizing. Portable.
//
// A row is the sum of its terms, each first made a line over the columns of the input that it
// reads, then scaled and placed as that input says.
#include <string.h>

#include <new>
#include <vector>

#include "decode.h"
#include "floats.h"

namespace bitlm {
namespace {

template <class T>
const T* array(const bitlm_weight* weight, int64_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(weight) + offset);
}

int64_t block_of(int64_t row) { return row / block_rows; }
int64_t lane_of(int64_t row) { return row % block_rows; }

int64_t group_end(const bitlm_shape& shape, int64_t group) {
  int64_t end = (group + 1) * shape.group_size;
  return end < shape.columns ? end : shape.columns;
}

// Where a row's element of an array [blocks][length][64] lies; the next one is 64 further.
int64_t first_element(int64_t row, int64_t length) {
  return block_of(row) * length * block_rows + lane_of(row);
}

class Row {
 public:
  Row(const bitlm_weight* weight, const bitlm_sub& sub)
      : weight_(weight), sub_(sub), inputs_(array<bitlm_input>(weight, sub.input)) {}

  // Both have room for the weight's columns and those of its widest input, and a word more.
  void write(int64_t row, float* line, float* sum) const {
    const bitlm_matrix* matrix = array<bitlm_matrix>(weight_, sub_.matrix);
    const bitlm_matrix* end = matrix + sub_.matrices;
    if (matrix < end && is_plain(inputs_[matrix->input], row_scales(*matrix, row))) {
      decode(*matrix++, row, sum);
    } else {
      memset(sum, 0, sizeof(float) * static_cast<size_t>(sub_.columns));
    }
    for (; matrix < end; matrix++) {
      decode(*matrix, row, line);
      place(inputs_[matrix->input], row_scales(*matrix, row), line, sum);
    }
    for (int i = 0; i < sub_.denses; i++) {
      const bitlm_dense& dense = array<bitlm_dense>(weight_, sub_.dense)[i];
      spread(dense, row, line);
      place(inputs_[dense.input], {}, line, sum);
    }
    for (int i = 0; i < sub_.lists; i++) {
      const bitlm_list& list = array<bitlm_list>(weight_, sub_.list)[i];
      collect(list, row, line);
      place(inputs_[list.input], {}, line, sum);
    }
  }

 private:
  struct RowScales {
    const float* first = nullptr;  // null: all 1
    int64_t stride = 0;
    float operator[](int64_t rank) const { return first ? first[rank * stride] : 1.0f; }
  };

  RowScales row_scales(const bitlm_matrix& matrix, int64_t row) const {
    if (!matrix.row_scales) return {};
    return {array<float>(weight_, matrix.row_scales) + row,
            ceil_div(matrix.rows, block_rows) * block_rows};
  }

  // line = factor * scales * codes.
  void decode(const bitlm_matrix& matrix, int64_t row, float* line) const {
    const bitlm_shape& shape = inputs_[matrix.input].shape;
    Decoder decoder(array<uint8_t>(weight_, matrix.codes), weight_->order, matrix, shape);
    int64_t columns = decoder.piece_columns(), scale_at = first_element(row, shape.groups);
    const char* scales = matrix.scales ? array<char>(weight_, matrix.scales) : nullptr;
    for (int64_t group = 0; group < shape.groups; group++, scale_at += block_rows) {
      float scale = matrix.factor;
      if (scales) scale *= load_float(scales, matrix.scale_type, scale_at);
      int64_t piece = group * decoder.group_pieces(), end = group_end(shape, group);
      for (int64_t column = group * shape.group_size; column < end; column += columns, piece++) {
        // What this writes past the group's end is overwritten by the next group, or not read.
        decoder.read(row, piece, scale, line + column);
      }
    }
  }

  // A value for each group: all of its columns have it.
  void spread(const bitlm_dense& dense, int64_t row, float* line) const {
    const bitlm_shape& shape = inputs_[dense.input].shape;
    const char* values = array<char>(weight_, dense.values);
    int64_t at = first_element(row, dense.length);
    for (int64_t group = 0; group < shape.groups; group++, at += block_rows) {
      float value = load_float(values, dense.type, at);
      for (int64_t k = group * shape.group_size; k < group_end(shape, group); k++) line[k] = value;
    }
  }

  // What salient entries add to the codes' own values there; elsewhere 0.
  void collect(const bitlm_list& list, int64_t row, float* line) const {
    const bitlm_shape& shape = inputs_[list.input].shape;
    memset(line, 0, sizeof(float) * static_cast<size_t>(shape.columns));
    const uint32_t* start = array<uint32_t>(weight_, list.starts) + row / 16 * (chunks(shape) + 1);
    const uint8_t* entries = array<uint8_t>(weight_, list.entries) + row % 16 * 4;
    const float* correction = array<float>(weight_, list.correction);
    correction += first_element(row, shape.groups);
    float scale = array<float>(weight_, list.scales)[row];
    for (int group = 0; group < shape.groups; group++, correction += block_rows) {
      float* at = line + static_cast<int64_t>(group) * shape.group_size;
      for (int i = 0; i < group_chunks(shape, group); i++, start++) {
        for (int64_t unit = start[0]; unit < start[1]; unit++) {
          const uint8_t* four = entries + unit * 128;
          for (int j = 0; j < 4; j++) {
            if (!(four[j] & 0x80)) at[four[j]] = scale * four[64 + j] + *correction;
          }
        }
        at += chunk_words * word_columns;
      }
    }
  }

  // Whether a line of this input is one of the weight's columns as it is.
  static bool is_plain(const bitlm_input& input, RowScales row_scales) {
    return !input.columns && !input.scales && !row_scales.first && input.rank == 1;
  }

  // Adds a line to the row.
  void place(const bitlm_input& input, RowScales row_scales, const float* line, float* sum) const {
    if (is_plain(input, row_scales)) {
      for (int64_t k = 0; k < input.shape.columns; k++) sum[k] += line[k];
      return;
    }
    const int32_t* columns = input.columns ? array<int32_t>(weight_, input.columns) : nullptr;
    const float* scales = input.scales ? array<float>(weight_, input.scales) : nullptr;
    for (int64_t k = 0; k < input.shape.columns; k++) {
      int64_t column = columns ? columns[k] : k;
      float scale = 0;
      for (int64_t j = 0; j < input.rank; j++) {
        scale += row_scales[j] * (scales ? scales[j * sub_.columns + column] : 1.0f);
      }
      sum[column] += scale * line[k];
    }
  }

  const bitlm_weight* weight_;
  const bitlm_sub& sub_;
  const bitlm_input* inputs_;
};

// Whether y is a sum over x's columns alone: no stages, and sums of groups only without ranks.
bool is_direct(const bitlm_weight* weight, const bitlm_sub& sub) {
  if (sub.stages || sub.projections) return false;
  const bitlm_input* inputs = array<bitlm_input>(weight, sub.input);
  for (int i = 0; i < sub.denses; i++) {
    int input = array<bitlm_dense>(weight, sub.dense)[i].input;
    if (input < 0 || inputs[input].rank != 1) return false;
  }
  return true;
}

size_t line_length(const bitlm_weight* weight, const bitlm_sub& sub) {
  int64_t columns = sub.columns;
  for (int i = 0; i < sub.inputs; i++) {
    int64_t own = array<bitlm_input>(weight, sub.input)[i].shape.columns;
    columns = columns > own ? columns : own;
  }
  return static_cast<size_t>(columns + word_columns);
}

constexpr int halves = 256;  // rounded at a time

void store(const float* row, int64_t columns, int type, char* to) {
  if (type == BITLM_FLOAT32) {
    memcpy(to, row, sizeof(float) * static_cast<size_t>(columns));
    return;
  }
  for (int64_t k = 0; k < columns; k += halves) {
    uint16_t rounded[halves];
    const float* from = row + k;
    int count = columns - k < halves ? static_cast<int>(columns - k) : halves;
    if (type == BITLM_FLOAT16) {
      for (int i = 0; i < count; i++) rounded[i] = float_to_half(from[i]);
    } else {
      for (int i = 0; i < count; i++) rounded[i] = float_to_bfloat(from[i]);
    }
    memcpy(to + 2 * k, rounded, static_cast<size_t>(2 * count));
  }
}

int write_rows(const bitlm_weight* weight, const int64_t* ids, int64_t count, void* out, int type) {
  const bitlm_sub* subs = reinterpret_cast<const bitlm_sub*>(weight + 1);
  size_t length = 0;
  for (int part = 0; part < weight->parts; part++) {
    if (!is_direct(weight, subs[part])) return BITLM_BAD_ARGUMENT;
    size_t own = line_length(weight, subs[part]);
    length = length > own ? length : own;
  }
  std::vector<float> line(length), sum(length);
  char* to = static_cast<char*>(out);
  for (int64_t i = 0; i < count; i++) {
    int part = 0;
    while (ids[i] >= subs[part].row + static_cast<int64_t>(subs[part].rows)) part++;
    Row(weight, subs[part]).write(ids[i] - subs[part].row, line.data(), sum.data());
    store(sum.data(), weight->columns, type, to);
    to += weight->columns * type_bytes(type);
  }
  return BITLM_OK;
}

}  // namespace
}  // namespace bitlm

int bitlm_cpu_rows(const bitlm_weight* weight, const int64_t* ids, int64_t count, void* out,
                   int type) {
  if (!weight || weight->magic != BITLM_MAGIC || weight->experts || weight->parts < 1) {
    return BITLM_BAD_ARGUMENT;
  }
  if (count < 0 || (count && (!ids || !out))) return BITLM_BAD_ARGUMENT;
  if (type != BITLM_FLOAT32 && type != BITLM_FLOAT16 && type != BITLM_BFLOAT16) {
    return BITLM_BAD_ARGUMENT;
  }
  for (int64_t i = 0; i < count; i++) {
    if (ids[i] < 0 || ids[i] >= weight->rows) return BITLM_BAD_ARGUMENT;
  }
  try {
    return bitlm::write_rows(weight, ids, count, out, type);
  } catch (const std::bad_alloc&) {
    return BITLM_NO_MEMORY;
  }
}
