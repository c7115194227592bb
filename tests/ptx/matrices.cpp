// Matrices: their loads and stores by whole warps, products of a warp, and of four warps (wgmma).
#include "elementwise.h"

namespace ptx {
namespace {

// 8 x 8 matrices of 16 bits: lane 8 m + r holds the address of row r of matrix m; lane l has columns 2 (l % 4) + {0, 1}
// of row l / 4, or, transposed, of that column.
template <int count, bool transposed>
void load_matrices(Warp& warp, const Instruction& in, uint32_t) {
  for (int m = 0; m < count; m++) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; row++) {
      const int lane = m * 8 + row;
      const uint64_t address = address_of(warp, in.operands[count], in.offset, lane, true);
      std::memcpy(matrix[row], place({warp, lane, address, 16, Access::read, true}), 16);
    }
    for (int lane = 0; lane < kLanes; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      warp.lanes(in.operands[m])[lane] = low | high << 16;
    }
  }
}
template <int count, bool transposed>
void store_matrices(Warp& warp, const Instruction& in, uint32_t) {
  for (int m = 0; m < count; m++) {
    uint16_t matrix[8][8];
    for (int lane = 0; lane < kLanes; lane++) {
      const uint32_t pair = uint32_t(warp.lanes(in.operands[1 + m])[lane]);
      for (int half = 0; half < 2; half++) {
        const int row = lane / 4, column = lane % 4 * 2 + half;
        (transposed ? matrix[column][row] : matrix[row][column]) = uint16_t(pair >> 16 * half);
      }
    }
    for (int row = 0; row < 8; row++) {
      const int lane = m * 8 + row;
      const uint64_t address = address_of(warp, in.operands[0], in.offset, lane, true);
      std::memcpy(place({warp, lane, address, 16, Access::write, true}, matrix[row]), matrix[row], 16);
    }
  }
}

float read_half(uint64_t bits) { return float(from_bits<_Float16>(bits & 0xffff)); }
float read_bfloat(uint64_t bits) { return from_bits<float>((bits & 0xffff) << 16); }

// a (16 x K) from four registers a lane, laid out as in the manual, `packed` numbers in each.
template <int K, int packed, auto read>
void read_fragment(Warp& warp, const int32_t* registers, double (*a)[K]) {
  for (int lane = 0; lane < kLanes; lane++) {
    for (int e = 0; e < 4 * packed; e++) {
      const int n = e / packed, part = e % packed;
      const double value = read(warp.lanes(registers[n])[lane] >> 32 / packed * part);
      a[lane / 4 + n % 2 * 8][lane % 4 * packed + part + n / 2 * (K / 2)] = value;
    }
  }
}

// sums += a b, of one row, k in order; columns side by side.
template <int K, int columns>
void add_products(const double (&a)[K], const double (&b)[K][columns], double (&sums)[columns]) {
  for (int k = 0; k < K; k++) {
    for (int column = 0; column < columns; column++) sums[column] += a[k] * b[k][column];
  }
}

// c (16 x 8) += a (16 x K) b (K x 8), fragments as in the manual, `packed` operands in 32 bits. The sum is cut off
// towards zero.
template <int K, int packed, auto read>
void multiply(Warp& warp, const Instruction& in, uint32_t) {
  double a[16][K], b[K][8];
  read_fragment<K, packed, read>(warp, in.operands + 4, a);
  for (int lane = 0; lane < kLanes; lane++) {
    for (int e = 0; e < 2 * packed; e++) {
      const int n = e / packed, part = e % packed;
      const double value = read(warp.lanes(in.operands[8 + n])[lane] >> 32 / packed * part);
      b[lane % 4 * packed + part + n * (K / 2)][lane / 4] = value;
    }
  }
  double sums[16][8];
  const auto each_sum = [&](auto function) {
    for (int e = 0; e < 4; e++) {
      for (int lane = 0; lane < kLanes; lane++) function(e, lane, sums[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
    }
  };
  each_sum([&](int e, int lane, double& sum) { sum = from_bits<float>(warp.lanes(in.operands[10 + e])[lane]); });
  for (int row = 0; row < 16; row++) add_products<K, 8>(a[row], b, sums[row]);
  each_sum([&](int e, int lane, double sum) { warp.lanes(in.operands[e])[lane] = to_bits(cut(sum)); });
}

// What a descriptor of a matrix in shared memory says, rows along K ("K-major") or, transposed, across it ("MN-major"):
// rows in groups of eight.
struct Described {
  uint64_t start, lead, stride, row_bytes;

  explicit Described(uint64_t bits) {
    start = (bits & 0x3fff) << 4;
    lead = (bits >> 16 & 0x3fff) << 4;
    stride = (bits >> 32 & 0x3fff) << 4;
    row_bytes = (bits >> 62) == 0 ? 16 : 256 >> (bits >> 62);
    if (bits >> 49 & 7) throw Problem("a descriptor with a base offset");
  }
  // 16 bytes of a row, whose place is swizzled by the number of the row in its group.
  uint64_t chunk(uint64_t row, uint64_t number) const {
    const uint64_t along = row_bytes == 16 ? number * lead : number * 16;
    return swizzled(start + row / 8 * stride + row % 8 * row_bytes + along);
  }
  // The same where row k holds number k of every row of the matrix, eight of them in 16 bytes.
  uint64_t across(uint64_t k, uint64_t number) const {
    const uint64_t wide = row_bytes / 16;
    if (wide == 1) return swizzled(start + number * stride + k / 8 * lead + k % 8 * 16);
    return swizzled(start + k / 8 * stride + k % 8 * row_bytes + number / wide * lead + number % wide * 16);
  }

 private:
  uint64_t swizzled(uint64_t address) const { return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4; }
};

// `rows` rows of K numbers (32 bytes) of a described matrix, from `first` on.
template <int K, int packed, auto read>
void read_described(Warp& warp, int32_t operand, int first, int rows, double (*matrix)[K]) {
  const Described described(warp.lanes(operand)[0]);
  for (int row = 0; row < rows; row++) {
    for (int number = 0; number < 2; number++) {
      const uint64_t address = described.chunk(uint64_t(first + row), uint64_t(number));
      const unsigned char* from = place({warp, 0, address, 16, Access::read, true});
      for (int k = 0; k < K / 2; k++) {
        uint32_t bits = 0;
        std::memcpy(&bits, from + k * (4 / packed), 4 / packed);
        matrix[row][number * (K / 2) + k] = read(bits);
      }
    }
  }
}

// The same of a transposed matrix, of 16-bit numbers.
template <int K, auto read>
void read_transposed(Warp& warp, int32_t operand, int first, int rows, double (*matrix)[K]) {
  const Described described(warp.lanes(operand)[0]);
  for (int k = 0; k < K; k++) {
    for (int number = 0; number < rows / 8; number++) {
      const uint64_t address = described.across(uint64_t(k), uint64_t(first / 8 + number));
      uint16_t bits[8];
      std::memcpy(bits, place({warp, 0, address, 16, Access::read, true}), 16);
      for (int e = 0; e < 8; e++) matrix[number * 8 + e][k] = read(bits[e]);
    }
  }
}

// d (64 x N) = scale d + a b of four warps, each its 16 rows; a in registers (as in mma.sync) or described, b described
// with a row for each column, or transposed. Asynchronous on a GPU; here the result is there at once.
template <int N, int K, int packed, auto read>
void multiply_warpgroup(Warp& warp, const Instruction& in, uint32_t) {
  constexpr int kSums = N / 2;
  // Behind d: a (four registers, or one), b, scale, two signs, and for 16-bit types whether b (and a) are transposed.
  const bool described = in.count == kSums + (packed == 2 ? 7 : 5);
  const int32_t* const given = in.operands + kSums;
  double a[16][K], b[N][K];
  const int row = warp.number % 4 * 16;
  if (described && packed == 2 && warp.lanes(given[5])[0] != 0) {
    read_transposed<K, read>(warp, given[0], row, 16, a);
  } else if (described) {
    read_described<K, packed, read>(warp, given[0], row, 16, a);
  } else {
    read_fragment<K, packed, read>(warp, given, a);
  }
  const int32_t* const rest = given + (described ? 1 : 4);
  const bool transposed = packed == 2 && warp.lanes(in.operands[in.count - 1])[0] != 0;
  if (transposed) {
    read_transposed<K, read>(warp, rest[0], 0, N, b);
  } else {
    read_described<K, packed, read>(warp, rest[0], 0, N, b);
  }
  for (int n = 2; n < 4; n++) {
    if (warp.lanes(rest[n])[0] != 1) throw Problem("a product with a changed sign");
  }
  double across[K][N], sums[16][N];
  for (int k = 0; k < K; k++) {
    for (int column = 0; column < N; column++) across[k][column] = b[column][k];
  }
  const auto each_sum = [&](auto function) {
    for (int e = 0; e < kSums; e++) {
      for (int lane = 0; lane < kLanes; lane++) {
        function(warp.lanes(in.operands[e])[lane], lane,
                 sums[lane / 4 + e % 4 / 2 * 8][e / 4 * 8 + lane % 4 * 2 + e % 2]);
      }
    }
  };
  const uint64_t* const adds = warp.lanes(rest[1]);
  each_sum([&](uint64_t bits, int lane, double& sum) { sum = adds[lane] & 1 ? from_bits<float>(bits) : 0.0f; });
  for (int row = 0; row < 16; row++) add_products<K, N>(a[row], across, sums[row]);
  each_sum([](uint64_t& bits, int, double sum) { bits = to_bits(cut(sum)); });
}

}  // namespace

void add_matrices(Table& table) {
  const auto add_shape = [&]<int count>(const std::string& shape) {
    const std::string load = "ldmatrix.sync.aligned.m8n8." + shape, store = "stmatrix.sync.aligned.m8n8." + shape;
    table[load + ".shared.b16"] = {load_matrices<count, false>, Kind::together};
    table[load + ".trans.shared.b16"] = {load_matrices<count, true>, Kind::together};
    table[store + ".shared.b16"] = {store_matrices<count, false>, Kind::together};
    table[store + ".trans.shared.b16"] = {store_matrices<count, true>, Kind::together};
  };
  add_shape.operator()<1>("x1");
  add_shape.operator()<2>("x2");
  add_shape.operator()<4>("x4");
  const std::string product = "mma.sync.aligned.", wide = "m16n8k16.row.col.f32.";
  table[product + "m16n8k8.row.col.f32.tf32.tf32.f32"] = {multiply<8, 1, read_tf32>, Kind::together};
  table[product + wide + "f16.f16.f32"] = {multiply<16, 2, read_half>, Kind::together};
  table[product + wide + "bf16.bf16.f32"] = {multiply<16, 2, read_bfloat>, Kind::together};
  const auto add_columns = [&]<int N>() {
    const std::string start = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(N);
    table[start + "k8.f32.tf32.tf32"] = {multiply_warpgroup<N, 8, 1, read_tf32>, Kind::together};
    table[start + "k16.f32.f16.f16"] = {multiply_warpgroup<N, 16, 2, read_half>, Kind::together};
    table[start + "k16.f32.bf16.bf16"] = {multiply_warpgroup<N, 16, 2, read_bfloat>, Kind::together};
  };
  add_columns.operator()<8>();
  add_columns.operator()<16>();
  add_columns.operator()<32>();
  add_columns.operator()<64>();
  add_columns.operator()<128>();
  add_columns.operator()<256>();
  const auto nothing = [](Warp&, const Instruction&, uint32_t) {};
  for (const char* name : {"fence", "commit_group", "wait_group"}) {
    table[std::string("wgmma.") + name + ".sync.aligned"] = {nothing, Kind::together};
  }
  table["fence.proxy.async.shared::cta"] = {nothing, Kind::simple};
}

}  // namespace ptx
