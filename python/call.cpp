#include "call.h"

#include "ops.h"

namespace mistral::python {

void bind_call(py::module_& m) {
  // The classes are local to the module, because tests load other modules that have them too.
  py::class_<Call>(m, "Call", py::module_local())
      .def_readonly("workspace_bytes", &Call::workspace_bytes)
      .def_readonly("counters", &Call::counters)
      .def("run", &Call::run, py::arg("workspace"), py::arg("counters"), py::arg("target"));
  py::class_<Recording>(m, "Recording", py::module_local())
      .def(py::init<>())
      .def("add", &Recording::add, py::arg("call"))
      .def("recheck", &Recording::recheck)
      .def("run", &Recording::run, py::arg("workspace"), py::arg("threads"));
}

}  // namespace mistral::python
