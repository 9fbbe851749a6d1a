#include "sequences.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <utility>

namespace mistral::python {
namespace {

// In radians per position. Far above any use, and small enough not to overflow in a kernel.
constexpr double kMaxFrequency = 1e6;

std::string at(int64_t index, const char* column, int64_t value) {
  return "sequences[" + std::to_string(index) + "]." + column + " is " + std::to_string(value);
}

// Checks that the tokens of row i begin at index `packed`, where those of row i - 1 end, and that
// they are among the `tokens` tokens of the call. Returns the index where they end.
int64_t check_tokens(const char* op, int64_t i, const Sequence& s, int64_t packed, int64_t tokens) {
  if (s.first_token != packed) {
    fail(op, at(i, "first_token", s.first_token) + ", expected " + std::to_string(packed) +
                 ": tokens are packed in the order of the table");
  }
  if (s.count < 0 || s.count > tokens - packed) {
    fail(op, at(i, "count", s.count) + ", expected 0 to " + std::to_string(tokens - packed) +
                 ": there are " + std::to_string(tokens) + " tokens in all");
  }
  return packed + s.count;
}

void check_position(const char* op, int64_t i, const Sequence& s) {
  if (s.position < 0 || s.position >= kNoWindow) {
    fail(op, at(i, "position", s.position) + ", expected 0 to 2^62 - 1");
  }
}

// Whether rows i - 1 and i hold one new token each, the second of which follows the first in the
// same sequence and ring.
bool shares_ring(const Sequence* sequences, int64_t i) {
  if (i == 0) return false;
  const Sequence &s = sequences[i], &before = sequences[i - 1];
  return s.count == 1 && before.count == 1 && s.position == before.position + 1 &&
         s.ring_row == before.ring_row && s.capacity == before.capacity;
}

}  // namespace

void check_rows(const char* op, const AttentionParams& p) {
  int64_t packed = 0, shared = 0;  // `shared`: the number of earlier rows that share row i's ring
  std::vector<std::pair<int64_t, int64_t>> rings;  // the pool rows [begin, end) of each ring
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const Sequence& s = p.sequences[i];
    packed = check_tokens(op, i, s, packed, p.tokens);
    check_position(op, i, s);
    if (s.capacity < 1) fail(op, at(i, "capacity", s.capacity) + ", expected 1 or more");
    if (s.capacity < p.window && s.capacity < s.position + s.count) {
      fail(op, at(i, "capacity", s.capacity) + ", expected the window or " +
                   std::to_string(s.position + s.count) + ", the sequence's length, or more");
    }
    // Divides instead of multiplying, because the product with a wrong capacity may overflow.
    if (s.ring_row < 0 || s.ring_row > p.pool_rows ||
        s.capacity > (p.pool_rows - s.ring_row) / p.kv_heads) {
      fail(op, at(i, "ring_row", s.ring_row) + " and its ring has " + std::to_string(p.kv_heads) +
                   " heads of " + std::to_string(s.capacity) + " rows, expected it to lie in the " +
                   "pool's " + std::to_string(p.pool_rows) + " rows");
    }
    shared = shares_ring(p.sequences, i) ? shared + 1 : 0;
    // The tokens of rows that share a ring are all stored before any of them attends. So row i must
    // not take a slot that the first of these rows still reads.
    if (shared > 0 && s.capacity <= s.position && s.capacity - shared < p.window) {
      fail(op, at(i, "capacity", s.capacity) + ", expected the window and " +
                   std::to_string(shared) + " more, one for each row before it in its ring, or " +
                   std::to_string(s.position + 1) + ", the sequence's length, or more");
    }
    if (shared == 0) rings.emplace_back(s.ring_row, s.ring_row + p.kv_heads * s.capacity);
  }
  if (packed != p.tokens) {
    fail(op, "sequences has " + std::to_string(packed) + " new tokens, expected " +
                 std::to_string(p.tokens) + " like q");
  }
  std::sort(rings.begin(), rings.end());
  for (size_t i = 1; i < rings.size(); ++i) {
    if (rings[i].first < rings[i - 1].second) {
      fail(op, "sequences has a ring at row " + std::to_string(rings[i].first) + ", expected " +
                   std::to_string(rings[i - 1].second) + " or more: the ring at row " +
                   std::to_string(rings[i - 1].first) + " ends there");
    }
  }
}

void check_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window) {
  const char* op = q.op();
  if (window < 1) fail(op, "window is " + std::to_string(window) + ", expected 1 or more or None");
  q.expect_shape({-1, -1, -1});
  check_head_dim(q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  k.expect_shape({tokens, -1, dim});
  const int64_t kv_heads = k.size(1);
  if (kv_heads == 0 || heads % kv_heads != 0) {
    fail(op, "q has " + std::to_string(heads) + " heads, expected a multiple of the " +
                 std::to_string(kv_heads) + " heads of k");
  }
  v.expect_shape({tokens, kv_heads, dim});
  for (const Tensor* tensor : {&k, &v}) tensor->expect_like(q);
  for (const Tensor* tensor : {&q, &k, &v}) tensor->expect_last_axis_contiguous();
}

void check_head_dim(const Tensor& x) {
  if (is_head_dim(x.size(2))) return;
  fail(x.op(), std::string(x.name()) + " has head dimension " + std::to_string(x.size(2)) +
                   ", expected a multiple of 32 up to " + std::to_string(kMaxHeadDim));
}

float checked_scale(const Tensor& q, std::optional<double> given) {
  const auto scale =
      static_cast<float>(given.value_or(1 / std::sqrt(static_cast<double>(q.size(2)))));
  if (scale > 0 && std::isfinite(scale)) return scale;
  std::ostringstream text;
  text << "scale is " << *given << ", expected a number above 0 that is not 0 or infinite in fp32";
  fail(q.op(), text.str());
}

void expect_cuda_heads(const Tensor& q) {
  if (q.dtype() == DType::f32) {
    throw py::type_error(std::string(q.op()) +
                         ": q has dtype torch.float32, expected torch.bfloat16 or torch.float16 on "
                         "a CUDA device");
  }
  if (!cuda::attention_takes_head_dim(q.size(2))) {
    fail(q.op(), "q has head dimension " + std::to_string(q.size(2)) +
                     ", expected 64 or 128 on a CUDA device");
  }
}

RaggedBatch::RaggedBatch(const char* op, Tensor q_, Tensor k_, Tensor v_, py::handle k_pool_,
                         py::handle v_pool_, py::handle sequences_, std::optional<int64_t> window_)
    : q(std::move(q_)),
      k(std::move(k_)),
      v(std::move(v_)),
      k_pool(op, "k_pool", k_pool_),
      v_pool(op, "v_pool", v_pool_),
      table(op, "sequences", sequences_),
      window(window_.value_or(kNoWindow)) {
  check_heads(q, k, v, window);
  const int64_t tokens = q.size(0);
  k_pool.expect_shape({-1, q.size(2)});
  v_pool.expect_shape({k_pool.size(0), q.size(2)});
  for (const Tensor* tensor : {&k_pool, &v_pool}) tensor->expect_like(q);
  k_pool.expect_contiguous();
  v_pool.expect_contiguous();
  table.expect_shape({-1, kSequenceFields});
  table.expect_contiguous();
  table.expect_device_of(q);
  if (table.size(0) == 0 && tokens > 0) {
    fail(op, "sequences has 0 rows, expected 1 or more for the " + std::to_string(tokens) +
                 " tokens of q");
  }
  // A table in GPU memory is not read back, because every call would then wait for the GPU.
  if (!q.is_cuda()) check_rows(op, table_params());
}

void check_packed(const Tensor& x, const Table& table, bool with_positions) {
  table.expect_shape({-1, kSequenceFields});
  table.expect_contiguous();
  table.expect_device_of(x);
  const char* op = x.op();
  if (table.is_cuda()) {
    if (table.size(0) > 0 || x.size(0) == 0) return;
    fail(op,
         "sequences has 0 rows, expected 1 or more for " + std::to_string(x.size(0)) + " tokens");
  }
  const auto* sequences = static_cast<const Sequence*>(table.data());
  int64_t packed = 0;
  for (int64_t i = 0; i < table.size(0); ++i) {
    packed = check_tokens(op, i, sequences[i], packed, x.size(0));
    if (with_positions) check_position(op, i, sequences[i]);
  }
  if (packed == x.size(0)) return;
  fail(op, "sequences has " + std::to_string(packed) + " tokens, expected " +
               std::to_string(x.size(0)));
}

const double* checked_frequencies(const Tensor& q, py::handle frequencies_) {
  const Table frequencies(q.op(), "frequencies", frequencies_, "float64");
  frequencies.expect_shape({q.size(2) / 2});
  frequencies.expect_contiguous();
  frequencies.expect_device_of(q);
  const auto* values = static_cast<const double*>(frequencies.data());
  // Frequencies in GPU memory are not read back, because every call would then wait for the GPU.
  for (int64_t i = 0; !q.is_cuda() && i < frequencies.size(0); ++i) {
    if (values[i] >= 0 && values[i] <= kMaxFrequency) continue;
    fail(q.op(), "frequencies[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
                     ", expected 0 to " + std::to_string(kMaxFrequency) + " radians per position");
  }
  return values;
}

}  // namespace mistral::python
