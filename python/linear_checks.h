// Checks of arguments that all ops with weights share.
#pragma once

#include <pybind11/pybind11.h>

#include "../csrc/linear.h"
#include "tensor.h"

namespace mistral::python {

// Whether products must keep all bits of the activations. Otherwise the CPU may round activations
// to 8 bits (LinearParams::exact). Initially true if the environment variable MISTRAL_EXT_EXACT is
// set, and is neither empty nor "0". A caller may assign to the reference.
bool& exact_products();

// The names of weights in errors.
struct Names {
  const char* values[kMaxParts];
  const char* scales[kMaxParts];
};

Names names_of(Epilogue epilogue, size_t parts);

// The weights of a call. Each weight has values, scales (None if it has none) and the name of its
// format.
struct Weights {
  py::list values, scales, formats;
};

// Checks weight i against x [T, K] and returns it as a part.
WeightPart part_of(const char* op, const Names& names, size_t i, const Weights& weights,
                   const Tensor& x);
// The same for the only weight of an op.
WeightPart single_part(const char* op, const py::object& values, const py::object& scales,
                       const py::str& format, const Tensor& x);

// Checks what the CUDA kernels that dequantise need: they read 8 neighbouring values together.
void expect_readable_by_eights(const char* op, const WeightPart& weight, int64_t inputs);

// Checks the alignment that a CUDA kernel needs.
void expect_aligned(const char* op, const char* name, const void* begin, uintptr_t bytes);

// Checks the arguments of a product. norm and out may be None.
LinearParams checked_linear(const char* op, const Tensor& x, const Weights& weights,
                            const py::object& norm, double eps, const py::object& out,
                            Epilogue epilogue);

// The number of outputs of all parts together.
int64_t outputs_of_all(const LinearParams& p);

}  // namespace mistral::python
