// Runs the CPU kernels without torch: reads calls from standard input, writes their results to standard output.
//
//   driver [CAPABILITY]
//
// First the name of the kernels in use, kNameBytes, and their int64 floats_panel. A call: the name of the kernel
// (kNameBytes, zeros at the end), three int64 counts, then that many int64, doubles and arrays: the arguments in the
// order of launch.h, each kind on its own. An array: int64 role, int64 bytes, and the bytes of an input. The answer:
// int64 status, the bytes of the outputs.
//
// Each call is made twice, by one thread and by two, on arrays between guard bands. Statuses beyond those of launch.h:
// the bits differ, or a band is damaged.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "launch_cpu.h"

namespace {

using namespace h2ot;

constexpr size_t kNameBytes = 32;
constexpr int64_t kThreadsDiffer = 100, kBandDamaged = 101;
enum Role : int64_t { kNull, kInput, kOutput };

[[noreturn]] void fail(const char* what, const char* name) {
  fprintf(stderr, "driver: %s %s\n", what, name);
  exit(2);
}

// False at the end of the input, where nothing is read.
bool read(void* data, size_t bytes) {
  const size_t got = fread(data, 1, bytes, stdin);
  if (got != bytes && got != 0) fail("input ends within", "a call");
  return got == bytes;
}
template <class T>
std::vector<T> read_all(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (count && !read(values.data(), values.size() * sizeof(T))) fail("input ends within", "a call");
  return values;
}

// Bytes between two bands. An output holds the byte of the bands until it is written.
class Array {
 public:
  Array() {
    const std::vector<int64_t> header = read_all<int64_t>(2);
    role_ = Role(header[0]);
    size_ = size_t(header[1]);
    memory_ = static_cast<unsigned char*>(aligned_alloc(kBand, (size_ + kBand - 1) / kBand * kBand + 2 * kBand));
    if (!memory_) fail("no memory for", "an array");
    clear();
    if (role_ == kInput && size_ && !read(data(), size_)) fail("input ends within", "an array");
  }
  ~Array() { free(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  bool is_output() const { return role_ == kOutput; }
  size_t size() const { return size_; }
  unsigned char* data() const { return role_ == kNull ? nullptr : memory_ + kBand; }
  void clear() {
    memset(memory_, kPoison, kBand);
    memset(memory_ + kBand + size_, kPoison, kBand);
    if (is_output()) memset(data(), kPoison, size_);
  }
  bool is_damaged() const {
    for (size_t i = 0; i < kBand; i++) {
      if (memory_[i] != kPoison || memory_[kBand + size_ + i] != kPoison) return true;
    }
    return false;
  }

 private:
  static constexpr size_t kBand = 64;
  static constexpr unsigned char kPoison = 0xa5;
  Role role_;
  size_t size_;
  unsigned char* memory_;
};

// The arguments of a call, read in order.
class Arguments {
 public:
  Arguments() {
    const std::vector<int64_t> counts = read_all<int64_t>(3);
    integers_ = read_all<int64_t>(counts[0]);
    reals_ = read_all<double>(counts[1]);
    arrays_ = std::vector<Array>(size_t(counts[2]));
  }
  void rewind() { integer_ = real_ = array_ = 0; }
  bool all_read() const { return integer_ == integers_.size() && real_ == reals_.size() && array_ == arrays_.size(); }
  std::vector<Array>& arrays() { return arrays_; }

  int64_t integer() { return integers_.at(integer_++); }
  double real() { return reals_.at(real_++); }
  Dtype dtype() { return Dtype(integer()); }
  void fill(int64_t* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = integer();
  }
  template <class T = void>
  T* array() {
    return reinterpret_cast<T*>(arrays_.at(array_++).data());
  }

 private:
  std::vector<int64_t> integers_;
  std::vector<double> reals_;
  std::vector<Array> arrays_;
  size_t integer_ = 0, real_ = 0, array_ = 0;
};

Tokens tokens(Arguments& a) {
  return {a.array(),   a.dtype(),   a.integer(), a.integer(), a.integer(),
          a.integer(), a.integer(), a.integer(), a.integer(), a.integer()};
}

ScoreArgs score_args(Arguments& a) {
  return {tokens(a),         a.integer(),       a.array<bool>(),   a.array<double>(),
          a.array<double>(), a.array<double>(), a.array<double>(), a.array<int64_t>(),
          a.array<bool>(),   a.real(),          a.integer() != 0,  a.real()};
}

SelectArgs select_args(Arguments& a, const double* score, const bool* mask) {
  return {score,       a.integer(), a.integer(),       a.integer(), mask, a.array<int64_t>(),
          a.integer(), a.integer(), a.array<int64_t>()};
}

RecoverAttentionArgs recover_args(Arguments& a) {
  return {a.array(),
          a.array(),
          a.array(),
          a.dtype(),
          a.integer(),
          a.integer(),
          a.integer(),
          a.integer(),
          a.integer(),
          a.integer(),
          {a.integer(), a.integer()},
          {a.integer(), a.integer()},
          {a.integer(), a.integer()},
          a.real(),
          a.array()};
}

InterpolateArgs interpolate_args(Arguments& a) {
  return {a.array(),          a.dtype(),   a.integer(),
          a.integer(),        a.integer(), a.integer(),
          a.array<int64_t>(), a.integer(), Interpolation(a.integer()),
          a.array()};
}

LinearFloatsArgs linear_args(Arguments& a) {
  return {a.array<float>(), a.array<float>(), a.integer(),
          a.integer(),      a.integer(),      a.integer(),
          a.array<float>(), a.array<float>(), Activation(a.integer()),
          a.array<float>(), a.integer() != 0, a.array<float>(),
          a.array<float>(), a.real()};
}

Status run(std::string_view name, Arguments& a, const Parallel& pool) {
  const Kernels& kernel = kernels();
  if (name == "score") return kernel.score(score_args(a), pool);
  if (name == "cluster") {
    const ScoreArgs score = score_args(a);
    const SelectArgs select = select_args(a, score.score, score.valid);
    return kernel.cluster({score, select, a.array<int64_t>()}, pool);
  }
  if (name == "select") {
    const double* const score = a.array<double>();
    const bool* const mask = a.array<bool>();
    return kernel.select(select_args(a, score, mask), pool);
  }
  if (name == "motion") {
    return kernel.motion({a.array(), a.dtype(), a.integer(), a.integer(), a.integer(), a.integer(), a.integer(),
                          a.integer(), a.integer(), a.integer(), a.array<double>()},
                         pool);
  }
  if (name == "attention_score") {
    AttentionScoreArgs args = {a.array(),   a.array(),   a.dtype(), a.integer(), a.integer(), a.integer(),
                               a.integer(), a.integer(), {},        {},          a.real(),    a.array()};
    a.fill(args.query_stride, 5);
    a.fill(args.key_stride, 5);
    return kernel.attention_score(args, pool);
  }
  if (name == "gather") {
    GatherArgs args = {a.array(), a.dtype(),   int32_t(a.integer()), int32_t(a.integer()), {},
                       {},        a.integer(), a.array<int64_t>(),   a.integer(),          a.array(),
                       a.array()};
    a.fill(args.size, args.dims);
    a.fill(args.stride, args.dims);
    return kernel.gather(args, pool);
  }
  if (name == "scatter") {
    ScatterArgs args = {a.array(), a.dtype(),   int32_t(a.integer()), int32_t(a.integer()), {},
                        {},        a.integer(), a.array<int64_t>(),   a.integer(),          a.array()};
    a.fill(args.size, args.dims);
    a.fill(args.stride, args.dims);
    return kernel.scatter(args, pool);
  }
  if (name == "assign") {
    return kernel.assign({tokens(a), a.array<int64_t>(), a.integer(), a.integer(), a.array<bool>(), a.array<int64_t>(),
                          a.array<int64_t>()},
                         pool);
  }
  if (name == "merge") {
    return kernel.merge({a.array(), a.dtype(), a.integer(), a.integer(), a.integer(), a.integer(), a.integer(),
                         a.integer(), a.integer(), a.array<int64_t>(), a.array(), a.array(), a.array()},
                        pool);
  }
  if (name == "recover_attention") return kernel.recover_attention(recover_args(a), pool);
  if (name == "recover_attention_backward") {
    return kernel.recover_attention_backward({recover_args(a), a.array(), a.array(), a.array(), a.array()}, pool);
  }
  if (name == "recover_tail") {
    return kernel.recover_tail({a.array(), a.array(), a.array(), a.array(), a.array(), a.array(), a.dtype(),
                                a.integer(), a.integer(), a.integer(), a.integer(), a.real(), a.array()},
                               pool);
  }
  if (name == "recover_rotated") {
    return kernel.recover_rotated({recover_args(a), a.array<float>(), a.array<float>(), a.array<float>(),
                                   a.array<float>(), a.integer(), a.real(), a.array<float>()},
                                  pool);
  }
  if (name == "add_norm") {
    return kernel.add_norm({a.array(), a.array(), a.dtype(), a.dtype(), a.dtype(), a.integer(), a.integer(),
                            a.integer(), a.integer(), a.array(), a.array(), a.dtype(), a.real(), a.array(), a.array()},
                           pool);
  }
  if (name == "graph_update") {
    return kernel.graph_update({a.array(), a.array(), a.array(), a.array(), a.dtype(), a.integer(), a.integer(),
                                a.integer(), a.integer(), a.array<bool>(), a.integer(), a.integer(), a.array(),
                                a.array(), a.array(), a.array(), a.real(), a.array(), a.array()},
                               pool);
  }
  if (name == "linear_floats") return kernel.linear_floats(linear_args(a), pool);
  if (name == "mlp_floats") {
    const LinearFloatsArgs first = linear_args(a);
    return kernel.mlp_floats({first, linear_args(a)}, pool);
  }
  if (name == "interpolate") return kernel.interpolate(interpolate_args(a), pool);
  if (name == "interpolate_backward") {
    return kernel.interpolate_backward({interpolate_args(a), a.array(), a.array()}, pool);
  }
  fail("no kernel", std::string(name).c_str());
}

void two_threads(int64_t tasks, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  std::thread other(body, context, tasks / 2, tasks);
  body(context, 0, tasks / 2);
  other.join();
}

// Reads the rest of a call, makes it twice, and answers.
void call(std::string_view name) {
  Arguments arguments;
  std::vector<std::vector<unsigned char>> serial;
  const Status status = run(name, arguments, {nullptr, 1});
  if (!arguments.all_read()) fail("too many arguments for", std::string(name).c_str());
  bool damaged = false, differs = false;
  for (Array& array : arguments.arrays()) {
    damaged |= array.is_damaged();
    serial.emplace_back(array.data(), array.data() + (array.is_output() ? array.size() : 0));
    array.clear();
  }
  arguments.rewind();
  differs |= run(name, arguments, {two_threads, 2}) != status;
  for (size_t i = 0; i < serial.size(); i++) {
    const Array& array = arguments.arrays()[i];
    damaged |= array.is_damaged();
    differs |= status == Status::ok && array.is_output() && memcmp(array.data(), serial[i].data(), array.size()) != 0;
  }
  const int64_t result = damaged ? kBandDamaged : differs ? kThreadsDiffer : int64_t(status);
  fwrite(&result, sizeof result, 1, stdout);
  for (const Array& array : arguments.arrays()) {
    if (array.is_output()) fwrite(array.data(), 1, array.size(), stdout);
  }
}

}  // namespace

int main(int count, char** argument) {
  if (count > 1 && !set_capability(argument[1])) fail("this machine cannot run", argument[1]);
  char name[kNameBytes + 1] = {};
  strncpy(name, kernels().name, kNameBytes);
  fwrite(name, 1, kNameBytes, stdout);
  fwrite(&kernels().floats_panel, sizeof(int64_t), 1, stdout);
  fflush(stdout);
  while (read(name, kNameBytes)) {
    call(name);
    fflush(stdout);
  }
  return 0;
}
