// A torch tensor as the bindings see it: the address and the layout of its elements. These are read
// through the Python attributes of the tensor, so this module needs neither torch headers nor
// libtorch. If a check fails, the message names the op, the argument, its value, and what was
// expected.
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
  // Throws TypeError unless `object` is a CPU or CUDA tensor of a dtype that the kernels know.
  Tensor(const char* op, const char* name, py::handle object);

  const char* op() const { return op_; }
  const char* name() const { return name_; }
  void* data() const { return data_; }
  int64_t dims() const { return static_cast<int64_t>(shape_.size()); }
  int64_t size(int64_t axis) const { return shape_[static_cast<size_t>(axis)]; }
  int64_t stride(int64_t axis) const { return strides_[static_cast<size_t>(axis)]; }
  DType dtype() const { return dtype_; }
  bool is_cuda() const { return device_index_ >= 0; }
  int device_index() const { return device_index_; }  // -1: the CPU

  // Returns a view [T, count, dim] of `count` heads of this matrix [T, N], from head `first` on. A
  // head has `dim` columns. Error messages call the view `name`.
  Tensor heads(const char* name, int64_t first, int64_t count, int64_t dim) const;

  // These throw ValueError (shape, stride) or TypeError (dtype, device). An expected size of -1
  // stands for any size.
  void expect_shape(std::initializer_list<int64_t> expected) const;
  void expect_device_of(const Tensor& other) const;
  void expect_like(const Tensor& other) const;  // the same dtype and device
  void expect_last_axis_contiguous() const;     // elements of a row are neighbours
  void expect_contiguous() const;
  // No two elements may share memory, as those of an expanded tensor do. An op that writes to the
  // tensor would change such an element several times, at the same time in several threads. Expects
  // that the last axis is contiguous.
  void expect_no_shared_elements() const;
  // Every row must begin at a multiple of 16 bytes, because CUDA kernels access 16 bytes at a time.
  void expect_aligned_rows() const;

 protected:
  // `dtype` is torch's name of the only dtype that is accepted. If it is null, the dtypes of DType
  // are accepted.
  Tensor(const char* op, const char* name, py::handle object, const char* dtype);

  [[noreturn]] void fail(const std::string& problem) const;

  const char* op_;
  const char* name_;
  void* data_ = nullptr;
  std::vector<int64_t> shape_, strides_;
  DType dtype_ = DType::f32;
  int device_index_ = -1;
};

// A tensor of one given dtype, such as the int64 sequence table. The dtype may be one that DType
// does not have, so `dtype()` has no meaning here.
class Table : public Tensor {
 public:
  Table(const char* op, const char* name, py::handle object, const char* dtype = "int64")
      : Tensor(op, name, object, dtype) {}
};

[[noreturn]] void fail(const char* op, const std::string& problem);

}  // namespace mistral::python
