// Which of the mistakes planted beside the right text is to run: SIMT_MISTAKE's, or none. tests/simt/planted.py
#pragma once

#include <cstdlib>

namespace simt {

inline const int planted_mistake = std::getenv("SIMT_MISTAKE") ? std::atoi(std::getenv("SIMT_MISTAKE")) : 0;

}  // namespace simt
