#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <utility>

namespace mistral::python {
namespace {

struct Torch {
  py::object module, tensor, float32, bfloat16, float16;
  // The names are made once, because attributes of tensors are looked up many times in every step
  // of a model.
  py::str dtype{"dtype"}, is_cpu{"is_cpu"}, data_ptr{"data_ptr"}, shape{"shape"}, stride{"stride"};
};

// The classes of torch, which are looked up once. The import takes no time, because a caller that
// has a tensor has already loaded torch.
const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> storage;
  return storage
      .call_once_and_store_result([] {
        const py::module_ module = py::module_::import("torch");
        return Torch{module, module.attr("Tensor"), module.attr("float32"), module.attr("bfloat16"),
                     module.attr("float16")};
      })
      .get_stored();
}

py::object get(py::handle object, const py::str& name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle object, const py::str& name) {
  PyObject* value = PyObject_CallMethodObjArgs(object.ptr(), name.ptr(), nullptr);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

std::string to_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + (sizes[i] < 0 ? "any" : std::to_string(sizes[i]));
  }
  return text + "]";
}

std::vector<int64_t> to_vector(const py::tuple& sizes) {
  std::vector<int64_t> out;
  out.reserve(sizes.size());
  for (const py::handle size : sizes) out.push_back(size.cast<int64_t>());
  return out;
}

const char* to_text(DType dtype) {
  switch (dtype) {
    case DType::f32: return "torch.float32";
    case DType::bf16: return "torch.bfloat16";
    case DType::f16: return "torch.float16";
  }
  return "unknown";
}

}  // namespace

void fail(const char* op, const std::string& problem) {
  throw py::value_error(std::string(op) + ": " + problem);
}

Tensor::Tensor(const char* op, const char* name, py::handle object)
    : Tensor(op, name, object, nullptr) {}

Tensor::Tensor(const char* op, const char* name, py::handle object, const char* wanted)
    : op_(op), name_(name) {
  const auto subject = [&] { return std::string(op) + ": " + name; };
  if (!py::isinstance(object, torch().tensor)) {
    throw py::type_error(subject() + " is a " + std::string(py::str(py::type::of(object))) +
                         ", expected a torch.Tensor");
  }
  if (!get(object, torch().is_cpu).cast<bool>()) {
    const py::object device = object.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    if (type != "cuda") {
      throw py::type_error(subject() + " is on " + type + ", expected cpu or cuda");
    }
    device_index_ = device.attr("index").cast<int>();
  }
  const py::object dtype = get(object, torch().dtype);
  if (wanted) {
    if (!dtype.is(torch().module.attr(wanted))) {
      throw py::type_error(subject() + " has dtype " + std::string(py::str(dtype)) +
                           ", expected torch." + wanted);
    }
  } else if (dtype.is(torch().float32)) {
    dtype_ = DType::f32;
  } else if (dtype.is(torch().bfloat16)) {
    dtype_ = DType::bf16;
  } else if (dtype.is(torch().float16)) {
    dtype_ = DType::f16;
  } else {
    throw py::type_error(subject() + " has dtype " + std::string(py::str(dtype)) +
                         ", expected torch.float32, torch.bfloat16 or torch.float16");
  }
  data_ = reinterpret_cast<void*>(call(object, torch().data_ptr).cast<uintptr_t>());
  shape_ = to_vector(get(object, torch().shape));
  strides_ = to_vector(call(object, torch().stride));
}

void Tensor::fail(const std::string& problem) const {
  python::fail(op_, std::string(name_) + " " + problem);
}

Tensor Tensor::heads(const char* name, int64_t first, int64_t count, int64_t dim) const {
  const int64_t element_bytes = dtype_ == DType::f32 ? 4 : 2;
  Tensor part = *this;
  part.name_ = name;
  part.data_ = static_cast<char*>(data_) + first * dim * element_bytes;
  part.shape_ = {size(0), count, dim};
  part.strides_ = {stride(0), dim, 1};
  return part;
}

void Tensor::expect_shape(std::initializer_list<int64_t> expected) const {
  const std::vector<int64_t> wanted(expected);
  bool equal = wanted.size() == shape_.size();
  for (size_t i = 0; equal && i < wanted.size(); ++i) {
    equal = wanted[i] < 0 || wanted[i] == shape_[i];
  }
  if (!equal) fail("has shape " + to_text(shape_) + ", expected " + to_text(wanted));
}

void Tensor::expect_device_of(const Tensor& other) const {
  const auto name = [](int index) {
    return index < 0 ? std::string("cpu") : "cuda:" + std::to_string(index);
  };
  if (device_index_ != other.device_index_) {
    throw py::type_error(std::string(op_) + ": " + name_ + " is on " + name(device_index_) +
                         ", expected " + name(other.device_index_) + " like " + other.name_);
  }
}

void Tensor::expect_like(const Tensor& other) const {
  if (dtype_ != other.dtype_) {
    throw py::type_error(std::string(op_) + ": " + name_ + " has dtype " + to_text(dtype_) +
                         ", expected " + to_text(other.dtype_) + " like " + other.name_);
  }
  expect_device_of(other);
}

void Tensor::expect_last_axis_contiguous() const {
  if (size(dims() - 1) > 1 && stride(dims() - 1) != 1) {
    fail("has strides " + to_text(strides_) + ", expected the last to be 1");
  }
}

void Tensor::expect_contiguous() const {
  for (const int64_t size : shape_) {
    if (size == 0) return;  // without elements, strides have no meaning
  }
  int64_t step = 1;
  for (int64_t axis = dims() - 1; axis >= 0; --axis) {
    if (size(axis) > 1 && stride(axis) != step) {
      fail("has strides " + to_text(strides_) + ", expected it to be contiguous");
    }
    step *= size(axis);
  }
}

void Tensor::expect_no_shared_elements() const {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size), without axes of one element
  for (int64_t axis = 0; axis < dims(); ++axis) {
    if (size(axis) == 0) return;
    if (size(axis) > 1) axes.emplace_back(stride(axis), size(axis));
  }
  std::sort(axes.begin(), axes.end());
  int64_t span = 1;  // the number of elements from the first to the last of the axes so far
  for (const auto& [step, count] : axes) {
    if (step < span) {
      fail("has strides " + to_text(strides_) + " and shape " + to_text(shape_) +
           ", expected no elements that share memory, because the op writes to them: clone it");
    }
    span += step * (count - 1);
  }
}

void Tensor::expect_aligned_rows() const {
  const int64_t elements = dtype_ == DType::f32 ? 4 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(data_) % 16 == 0;
  for (int64_t axis = 0; axis + 1 < dims(); ++axis) {
    aligned &= size(axis) <= 1 || stride(axis) % elements == 0;
  }
  if (!aligned) {
    fail("has strides " + to_text(strides_) + " and begins at address " +
         std::to_string(reinterpret_cast<uintptr_t>(data_)) +
         ", expected rows that begin at multiples of 16 bytes");
  }
}

}  // namespace mistral::python
