// How much the caches hold.
#pragma once

#include <cstdint>

namespace x_rope_cls::cpu {

// Bytes of the largest cache a core uses, which others may share: as Linux says, or a guess where
// it says nothing. No more than 64 MB: cores that share a larger one are many.
#pragma GCC visibility push(default)
int64_t cache_bytes();
#pragma GCC visibility pop

}  // namespace x_rope_cls::cpu
