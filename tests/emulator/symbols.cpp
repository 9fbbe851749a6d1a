#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <vector>

namespace emulator {
namespace {

using Symbols = std::map<uintptr_t, std::string>;  // functions by address

// Kernels have internal linkage, so the dynamic linker does not know them; the module's own file
// does.
Symbols read_symbols() {
  Dl_info module;
  if (!dladdr(reinterpret_cast<const void*>(&kernel_name), &module)) return {};
  std::ifstream stream(module.dli_fname, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  if (file.size() < sizeof(Elf64_Ehdr) || memcmp(file.data(), ELFMAG, SELFMAG) != 0) return {};

  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  Symbols symbols;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
    const auto* table = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[i].sh_offset);
    for (size_t j = 0; j < sections[i].sh_size / sizeof(Elf64_Sym); ++j) {
      if (ELF64_ST_TYPE(table[j].st_info) != STT_FUNC) continue;
      symbols[reinterpret_cast<uintptr_t>(module.dli_fbase) + table[j].st_value] =
          names + table[j].st_name;
    }
  }
  return symbols;
}

std::string demangle(const std::string& symbol) {
  char* text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr);
  const std::string name = text ? text : symbol;
  free(text);
  return name;
}

void erase_all(std::string& text, const std::string& part) {
  for (size_t at; (at = text.find(part)) != std::string::npos;) text.erase(at, part.size());
}

// void a::b<int, (anonymous namespace)::C>(int, D) -> a::b<int, C>
std::string shorten(std::string name) {
  erase_all(name, "(anonymous namespace)::");
  name = name.substr(0, name.find('('));
  if (name.rfind("void ", 0) == 0) name.erase(0, strlen("void "));
  return name;
}

}  // namespace

std::string kernel_name(const void* function) {
  static const Symbols symbols = read_symbols();
  const auto found = symbols.find(reinterpret_cast<uintptr_t>(function));
  return found == symbols.end() ? "unknown kernel" : shorten(demangle(found->second));
}

}  // namespace emulator
