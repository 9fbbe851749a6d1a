#include "../csrc/sample.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "call.h"
#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

constexpr const char* op = "sample";

void check_option(int64_t row, const char* column, double value, bool valid, const char* expected) {
  if (valid) return;
  fail(op, "options[" + std::to_string(row) + "]." + column + " is " + std::to_string(value) +
               ", expected " + expected);
}

void check_options(int64_t row, const SamplingOptions& o) {
  const auto check = [&](const char* column, double value, bool valid, const char* expected) {
    check_option(row, column, value, valid, expected);
  };
  check("temperature", o.temperature, o.temperature >= 0 && o.temperature < INFINITY, "0 or more");
  check("top_k", o.top_k, o.top_k >= 0, "0 (all) or more");
  check("top_p", o.top_p, o.top_p > 0 && o.top_p <= 1, "more than 0, at most 1");
  check("min_p", o.min_p, o.min_p >= 0 && o.min_p <= 1, "0 to 1");
  check("repetition_penalty", o.repetition_penalty,
        o.repetition_penalty > 0 && o.repetition_penalty < INFINITY, "more than 0");
  check("presence_penalty", o.presence_penalty, std::isfinite(o.presence_penalty), "a number");
  check("frequency_penalty", o.frequency_penalty, std::isfinite(o.frequency_penalty), "a number");
}

// Row n of the logits uses row p.rows[n] of the tables: options, noise, history and bias. Checks
// these numbers, and the options in these rows. No two rows of logits may use the same row of the
// tables, because each changes the noise and history in its row.
void check_rows(const SampleParams& p, int64_t table_rows) {
  std::vector<int64_t> rows(p.rows, p.rows + p.num_rows);
  for (const int64_t row : rows) {
    if (row < 0 || row >= table_rows) {
      fail(op, "rows has " + std::to_string(row) + ", expected 0 to " +
                   std::to_string(table_rows - 1) + ", a row of options");
    }
    check_options(row, p.options[row]);
  }
  std::sort(rows.begin(), rows.end());
  const auto twice = std::adjacent_find(rows.begin(), rows.end());
  if (twice != rows.end()) {
    fail(op, "rows has " + std::to_string(*twice) + " twice, expected each row once");
  }
}

Call sample(py::object logits_, py::object rows_, py::object options_, py::object noise_,
            py::object history_, py::object bias_, py::object out_) {
  const Table logits(op, "logits", logits_, "float32"), rows(op, "rows", rows_);
  const Table options(op, "options", options_, "float64"), noise(op, "noise", noise_);
  const Table history(op, "history", history_, "int32"), out(op, "out", out_);
  logits.expect_shape({-1, -1});
  logits.expect_last_axis_contiguous();
  const int64_t vocab_size = logits.size(1);
  if (vocab_size > kMaxVocab) {
    fail(op, "logits has " + std::to_string(vocab_size) + " columns, expected at most " +
                 std::to_string(kMaxVocab));
  }
  rows.expect_shape({logits.size(0)});
  options.expect_shape({-1, kSamplingOptionFields});
  noise.expect_shape({options.size(0), kNoiseFields});
  history.expect_shape({options.size(0), vocab_size});
  for (const Table* table : {&rows, &options, &noise, &history}) {
    table->expect_contiguous();
    table->expect_device_of(logits);
  }

  SampleParams p{};
  p.logits = static_cast<const float*>(logits.data());
  p.rows = static_cast<const int64_t*>(rows.data());
  p.options = static_cast<const SamplingOptions*>(options.data());
  p.noise = static_cast<NoiseState*>(noise.data());
  p.history = static_cast<int32_t*>(history.data());
  if (!bias_.is_none()) {
    const Table bias(op, "bias", bias_, "float32");
    bias.expect_shape({options.size(0), vocab_size});
    bias.expect_contiguous();
    bias.expect_device_of(logits);
    p.bias = static_cast<const float*>(bias.data());
  }
  p.token_ids = static_cast<int64_t*>(out.data());
  p.num_rows = logits.size(0);
  p.vocab_size = vocab_size;
  p.stride_logits_row = logits.stride(0);
  // Tables in GPU memory are not read back, because every call would then wait for the GPU.
  if (!logits.is_cuda()) check_rows(p, options.size(0));
  // Each of the two scratch arrays, weights and keys, has this many elements.
  const int64_t elements = p.num_rows * vocab_size;
  return {elements * int64_t{sizeof *p.weights + sizeof *p.keys}, 0,
          [logits, p, elements](void* workspace, int32_t*, ExecutionTarget target) mutable {
            p.weights = static_cast<uint64_t*>(workspace);
            p.keys = reinterpret_cast<uint32_t*>(p.weights + elements);
            run(logits, target, p, MISTRAL_KERNELS(sample));
          }};
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("sample", &sample, py::arg("logits"), py::arg("rows"), py::arg("options"), py::arg("noise"),
        py::arg("history"), py::arg("bias").none(true), py::arg("out"));
  m.def(
      "philox",
      [](std::array<uint64_t, 2> key, std::array<uint64_t, 4> counter) {
        const PhiloxBlock block =
            philox({{key[0], key[1]}}, {{counter[0], counter[1], counter[2], counter[3]}});
        return std::vector<uint64_t>(block.words, block.words + 4);
      },
      py::arg("key"), py::arg("counter"));
}

}  // namespace mistral::python
