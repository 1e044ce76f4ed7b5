#include "cache.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace x_rope_cls::cpu {
namespace {

constexpr int64_t kGuess = int64_t{32} << 20;
constexpr int64_t kMost = int64_t{64} << 20;
constexpr int kMostCaches = 8;

// Of one of the first core's caches, "32768K"; 0 where there is none.
int64_t bytes_of(int index) {
  char text[80];
  std::snprintf(text, sizeof(text), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
  std::FILE* file = std::fopen(text, "r");
  if (file == nullptr) return 0;
  const bool read = std::fgets(text, sizeof(text), file) != nullptr;
  std::fclose(file);
  if (!read) return 0;
  char* unit = nullptr;
  const int64_t size = std::strtoll(text, &unit, 10);
  if (size < 0 || size > kMost) return 0;
  return size << (*unit == 'K' ? 10 : *unit == 'M' ? 20 : 0);
}

int64_t largest() {
  int64_t most = 0;
  for (int i = 0; i < kMostCaches; ++i) most = std::max(most, bytes_of(i));
  return most == 0 ? kGuess : std::min(most, kMost);
}

}  // namespace

int64_t cache_bytes() {
  static const int64_t bytes = largest();
  return bytes;
}

}  // namespace x_rope_cls::cpu
