// The bindings, one file per op: checks its arguments and fills its params struct.
#pragma once

#include <pybind11/pybind11.h>

namespace mistral::python {

void bind_call(pybind11::module_& m);  // what attention and linear return
void bind_attention(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_rms_norm(pybind11::module_& m);
void bind_rope(pybind11::module_& m);
void bind_sample(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);

}  // namespace mistral::python
