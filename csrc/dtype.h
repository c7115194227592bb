// What the elements of a kernel's arguments are.
#pragma once

#include <cstdint>

namespace h2ot {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

}  // namespace h2ot
