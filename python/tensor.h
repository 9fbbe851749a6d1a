// A torch tensor as the bindings see it: where its elements are and how they are laid out, read
// through torch's Python attributes, so that this module needs no torch headers and no libtorch.
// The checks name the op, the argument, and what was expected and given.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "../csrc/common.h"

namespace mistral::python {

namespace py = pybind11;

class Tensor {
 public:
  // Throws TypeError unless `object` is a CPU tensor of a dtype that the kernels know.
  Tensor(const char* op, const char* name, py::handle object);

  void* data() const { return data_; }
  int64_t dims() const { return static_cast<int64_t>(shape_.size()); }
  int64_t size(int64_t axis) const { return shape_[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides_[static_cast<size_t>(axis)]; }
  DType dtype() const { return dtype_; }

  // Throw ValueError (shape, stride) or TypeError (dtype). An expected size of -1 is any size.
  void expect_shape(std::initializer_list<int64_t> expected) const;
  void expect_dtype_of(const Tensor& other) const;
  void expect_last_axis_contiguous() const;  // elements of a row are neighbours
  void expect_contiguous() const;

 protected:
  Tensor(const char* op, const char* name, py::handle object, bool is_table);

  [[noreturn]] void fail(const std::string& problem) const;

  const char* op_;
  const char* name_;
  void* data_ = nullptr;
  std::vector<int64_t> shape_, strides_;
  DType dtype_ = DType::f32;
};

// The int64 sequence table.
class Table : public Tensor {
 public:
  Table(const char* op, const char* name, py::handle object) : Tensor(op, name, object, true) {}
};

[[noreturn]] void fail(const char* op, const std::string& problem);

}  // namespace mistral::python
