// Checks of weights and other arguments, for the linear ops, dequantize and embedding. The weights
// of a call are its parts (csrc/linear.h).
#pragma once

#include <pybind11/pybind11.h>

#include "../csrc/linear.h"
#include "tensor.h"

namespace mistral::python {

// Whether products must keep all bits of the activations. If not, the CPU may round activations to
// 8 bits (LinearParams::exact). This is a setting of the process, to which a caller may assign. At
// first it is true if the environment variable MISTRAL_EXT_EXACT is set to anything but "0" or an
// empty string.
bool& exact_products();

// The names of the weights of a call, and of their scales, in error messages.
struct Names {
  const char* values[kMaxParts];
  const char* scales[kMaxParts];
};

// The names for a call with this number of parts.
Names names_of(Epilogue epilogue, size_t parts);

// The weights of a call. Each weight has values, scales (None if it is plain) and the name of its
// format.
struct Weights {
  py::list values, scales, formats;
};

// Checks weight i of a call against x [T, K], and returns it as a part.
WeightPart part_of(const char* op, const Names& names, size_t i, const Weights& weights,
                   const Tensor& x);
// The same for the only weight of an op.
WeightPart single_part(const char* op, const py::object& values, const py::object& scales,
                       const py::str& format, const Tensor& x);

// Checks that a CUDA kernel can dequantise a weight. The kernel reads 8 neighbouring values at a
// time, so K must be a multiple of 8, and values and scales must be aligned.
void expect_readable_by_eights(const char* op, const WeightPart& weight, int64_t inputs);

// Checks that the address `begin` is a multiple of `bytes`, as a CUDA kernel needs it.
void expect_aligned(const char* op, const char* name, const void* begin, uintptr_t bytes);

// Checks the arguments of a product and returns its params. norm is None if there is no RMSNorm,
// and out is None if there is no output tensor to check.
LinearParams checked_linear(const char* op, const Tensor& x, const Weights& weights,
                            const py::object& norm, double eps, const py::object& out,
                            Epilogue epilogue);

// The number of outputs of all parts together.
int64_t outputs_of_all(const LinearParams& p);

}  // namespace mistral::python
