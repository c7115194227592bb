// The rate of multiply-adds from registers to registers, which no product of float32 numbers passes on this machine:
// FLOP/s, summed over as many threads as the first argument says.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // more than units times latency
constexpr int kRounds = 20000, kTries = 4000;

static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of some tries, each of a fraction of a millisecond.
static void find_rate(double* rate) {
  Floats sum[kChains] = {}, share = sum[0] + 0.75f, step = sum[0] + 0.25f;
  double least = 1e9;
  for (int i = 0; i < kTries; i++) {
    const double start = seconds();
    for (int round = 0; round < kRounds; round++) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; chain++) sum[chain] = sum[chain] * share + step;
    }
    for (Floats& chain : sum) __asm__ volatile("" : : "m"(chain) : "memory");  // nobody may skip a round
    const double took = seconds() - start;
    least = took < least ? took : least;
  }
  *rate = 2.0 * kChains * (kBytes / 4) * kRounds / least;
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? atoi(arguments[1]) : 1;
  std::vector<double> rates(static_cast<size_t>(threads));
  std::vector<std::thread> running;
  for (double& rate : rates) running.emplace_back(find_rate, &rate);
  for (std::thread& thread : running) thread.join();
  double sum = 0;
  for (const double rate : rates) sum += rate;
  printf("%.6e\n", sum);
}
