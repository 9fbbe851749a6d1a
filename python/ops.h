// The bindings of the ops. A binding checks the arguments, fills the params struct, and starts the
// kernel or returns a Call (call.h) that starts it.
#pragma once

#include <pybind11/pybind11.h>

namespace mistral::python {

void bind_call(pybind11::module_& m);  // the classes of call.h
#define OP(op, Params) void bind_##op(pybind11::module_& m);
#define OP_OF_ONE_KERNEL(op, Params) OP(op, Params)
#include "../csrc/ops.def"

inline void bind_ops(pybind11::module_& m) {
#define OP(op, Params) bind_##op(m);
#define OP_OF_ONE_KERNEL(op, Params) OP(op, Params)
#include "../csrc/ops.def"
}

}  // namespace mistral::python
