#include <cstddef>
#include <cstdint>

#include "kernels.h"

#define MLORA_ISA scalar
#define MLORA_HAVE_AVX2 0
#define MLORA_HAVE_AVX512 0
#define MLORA_HAVE_BF16 0
#include "table.h"
