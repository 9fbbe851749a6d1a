#include "../csrc/repack.h"

#include "device.h"
#include "ops.h"
#include "tensor.h"

namespace mistral::python {
namespace {

constexpr const char* op = "repack";

BlockType type_of(const std::string& name) {
  std::string names;
  for (int i = 0; i < kNumBlockTypes; ++i) {
    if (name == kBlockTypes[i].name) return static_cast<BlockType>(i);
    names += (i ? ", " : "") + std::string(kBlockTypes[i].name);
  }
  fail(op, "type is '" + name + "', expected one of " + names);
}

// Checks the tensor of values or of scales that is to be filled, and returns its address. Returns
// null if the caller passed None, which means that it is not wanted.
uint8_t* address_of(const char* name, const py::object& part_, const char* dtype,
                    const Tensor& blocks, int64_t elements) {
  if (part_.is_none()) return nullptr;
  const Table part(op, name, part_, dtype);
  part.expect_shape({blocks.size(0), elements});
  part.expect_contiguous();
  part.expect_device_of(blocks);
  return static_cast<uint8_t*>(part.data());
}

void repack(py::object blocks_, const std::string& type, py::object values, py::object scales,
            ExecutionTarget target) {
  const Table blocks(op, "blocks", blocks_, "uint8");
  expect_cpu(blocks);
  blocks.expect_shape({-1, -1});
  blocks.expect_last_axis_contiguous();
  RepackParams p{};
  p.type = type_of(type);
  const BlockInfo& block = info(p.type);
  const FormatInfo& format = info(block.format);
  if (blocks.size(1) % block.bytes != 0) {
    fail(op, "blocks has " + std::to_string(blocks.size(1)) + " columns, expected a multiple of " +
                 std::to_string(block.bytes) + ", the bytes of a block of " + block.name);
  }
  p.blocks = static_cast<const uint8_t*>(blocks.data());
  p.rows = blocks.size(0);
  p.row_blocks = blocks.size(1) / block.bytes;
  p.stride_row = blocks.stride(0);
  p.values = address_of("values", values, format.value_dtype, blocks,
                        p.row_blocks * value_bytes(block) * 8 / format.element_bits);
  p.scales =
      address_of("scales", scales, format.scale_dtype, blocks, p.row_blocks * format.group_scales);
  run_on_cpu(target, p, &cpu::repack);
}

// The name of the format that each block type becomes, by the name of the block type.
py::dict block_formats() {
  py::dict formats;
  for (const BlockInfo& block : kBlockTypes) formats[block.name] = info(block.format).name;
  return formats;
}

}  // namespace

void bind_repack(py::module_& m) {
  m.def("repack", &repack, py::arg("blocks"), py::arg("type"), py::arg("values").none(true),
        py::arg("scales").none(true), py::arg("target"));
  m.def("block_formats", &block_formats);
}

}  // namespace mistral::python
