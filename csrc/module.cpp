// h2ot_kernels._C: what is not an operator: build information, the instruction set in use and its override, launch
// plans, samples of arrays. Tied to one Python version; the operator library is not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "cuda/plan.h"
#include "launch_cpu.h"
#include "samples.h"

namespace {

using h2ot::cuda::Plan;

h2ot::Dtype dtype_named(const std::string& name) {
  const std::string names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int32_t dtype = 0; dtype < 4; dtype++) {
    if (names[dtype] == name) return h2ot::Dtype(dtype);
  }
  throw pybind11::value_error("dtype: got '" + name + "', wanted float32, float64, bfloat16 or float16");
}

pybind11::dict described(const Plan& plan) {
  const char* distances[] = {"direct", "products", "exact_products"};
  const char* searches[] = {"stored", "streamed"};
  const h2ot::cuda::Workspace& at = plan.at;
  const std::pair<const char*, int64_t> parts[] = {{"rows", at.rows},
                                                   {"valid", at.valid},
                                                   {"exponent", at.exponent},
                                                   {"operands", at.operands},
                                                   {"scale", at.scale},
                                                   {"norm", at.norm},
                                                   {"matrix", at.matrix},
                                                   {"listed", at.listed},
                                                   {"listed_at", at.listed_at},
                                                   {"furthest", at.furthest},
                                                   {"nearest", at.nearest},
                                                   {"nearest_at", at.nearest_at},
                                                   {"proven", at.proven},
                                                   {"peaks", at.peaks},
                                                   {"peak_count", at.peak_count},
                                                   {"m", at.m},
                                                   {"key", at.key},
                                                   {"squared", at.squared},
                                                   {"parent", at.parent},
                                                   {"largest", at.largest},
                                                   {"arrived", at.arrived},
                                                   {"keys", at.keys},
                                                   {"flag", at.flag},
                                                   {"centre_low", at.centre_low},
                                                   {"centre_at", at.centre_at},
                                                   {"centre_reach", at.centre_reach},
                                                   {"centre_count", at.centre_count}};
  pybind11::dict offsets, result;
  for (const auto& [name, offset] : parts) {
    if (offset >= 0) offsets[name] = offset;
  }
  result["distance"] = distances[int32_t(plan.distance)];
  result["search"] = searches[int32_t(plan.search)];
  result["tile"] = pybind11::make_tuple(plan.tile_rows, plan.tile_columns);
  result["pitch"] = plan.pitch;
  result["line_pitch"] = plan.line_pitch;
  result["matrix_pitch"] = plan.matrix_pitch;
  result["tiles"] = plan.tiles;
  result["splits"] = plan.splits;
  result["list"] = plan.list;
  result["near"] = plan.near;
  result["samples"] = plan.samples;
  result["pool_warps"] = plan.pool_warps;
  result["overlaps"] = plan.overlaps;
  result["label_tile"] = pybind11::make_tuple(plan.labels.tile_rows, plan.labels.tile_columns);
  result["label_splits"] = plan.labels.splits;
  result["workspace"] = at.bytes;
  result["offsets"] = offsets;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, the CPU capability in use, plans of kernels, samples of arrays.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["version"] = H2OT_VERSION;
        info["compiler"] = H2OT_COMPILER;
        info["torch_target"] = "2.10 (stable ABI)";
        info["cuda_architectures"] = H2OT_CUDA_ARCHITECTURES;
        return info;
      },
      "Version, compiler, ABI target and the CUDA architectures that were compiled in ('' for none).");
  m.def(
      "capability", [] { return std::string(h2ot::kernels().name); },
      "The instruction set whose CPU kernels run: 'portable', 'avx2', 'avx512' or 'neon'.");
  m.def(
      "runnable_capabilities", [] { return std::string(h2ot::runnable_capabilities()); },
      "The instruction sets that this machine can run, best first, comma-separated.");
  m.def(
      "set_capability",
      [](const std::string& name) {
        if (!h2ot::set_capability(name.c_str())) {
          throw pybind11::value_error("capability '" + name +
                                      "' cannot run here; one of: " + h2ot::runnable_capabilities());
        }
      },
      pybind11::arg("name"), "Choose the instruction set for the whole process (for tests and comparisons).");
  m.def("tiles_run", &h2ot::tiles_run,
        "Whether kernels run on the tile unit (AMX): the search of scoring and labels, linear layers, MLPs, "
        "recovery in rotated channels and, in bfloat16, attention and its scores. So where one was found, "
        "H2OT_KERNELS_TILES is not 0 and the kernels "
        "in use are 'avx512'.");
  m.def("dots_run", &h2ot::dots_run,
        "Whether linear layers, attention and recovery in bfloat16 may run by products of pairs (AVX512-BF16): those "
        "were found, and the kernels in use are 'avx512'. Where tiles_run, too, the tile unit does the work.");
  m.def(
      "floats_panel", [] { return h2ot::kernels().floats_panel; },
      "Outputs of a panel of weights that linear layers in float32 by vectors take, with the kernels in use.");
  pybind11::class_<h2ot::Samples>(m, "Samples", "Copies of parts of arrays, to see whether those have changed.")
      .def(pybind11::init([](const std::vector<std::array<int64_t, 4>>& arrays) {
             std::vector<h2ot::Sampled> sampled;
             for (const auto& [address, count, step, size] : arrays) {
               sampled.push_back({reinterpret_cast<const std::byte*>(address), count, step, size});
             }
             return h2ot::Samples(std::move(sampled));
           }),
           pybind11::arg("arrays"), "(address, runs, bytes from one to the next, bytes of one) of each array.")
      .def("same", &h2ot::Samples::same, "Whether all have the bits that they had; the arrays must still be there.");
  m.def(
      "plan_score_cpu",
      [](int64_t N, int64_t C, int64_t k, const std::string& dtype, bool index_only) {
        double output = 0;
        h2ot::ScoreArgs args = {};
        args.x = {nullptr, dtype_named(dtype), 1, N, 1, C, N * C, C, C, 1};
        args.k = k;
        args.distance = index_only ? nullptr : &output;
        const h2ot::ScorePlan plan = h2ot::kernels().plan_score(args);
        const char* searches[] = {"stored", "streamed", "exact"};
        return pybind11::make_tuple(searches[int32_t(plan.search)], plan.scratch);
      },
      "(search, bytes of scratch) of the CPU kernel for a sample of N contiguous tokens: \"stored\" keeps all "
      "distances, "
      "\"streamed\" the nearest of each token, \"exact\" searches in float64 (long k).",
      pybind11::arg("N"), pybind11::arg("C"), pybind11::arg("k") = 2, pybind11::arg("dtype") = "float32",
      pybind11::arg("index_only") = false);
  m.def(
      "plan_score",
      [](int64_t B, int64_t N, int64_t J, int64_t C, int64_t k, const std::string& dtype, bool in_place, int32_t major,
         int32_t minor, int32_t multiprocessors, int64_t centres, std::optional<int32_t> code) {
        const h2ot::cuda::Problem problem = {B, N, J, C, k, dtype_named(dtype), in_place, centres};
        h2ot::cuda::Machine machine = {major, minor, multiprocessors};
        if (code) machine.code = *code;
        return described(plan_score(problem, machine));
      },
      "What the CUDA kernels would do for x [B, N, J, C] on a device: search, tiles, samples per pass, workspace. "
      "centres: so many kept tokens label all, 0: no labels. code: the compute capability that its code was compiled "
      "for (90 for 9.0), None: the device's own.",
      pybind11::arg("B"), pybind11::arg("N"), pybind11::arg("J"), pybind11::arg("C"), pybind11::arg("k"),
      pybind11::arg("dtype"), pybind11::arg("in_place") = false, pybind11::arg("major") = 9, pybind11::arg("minor") = 0,
      pybind11::arg("multiprocessors") = 132, pybind11::arg("centres") = 0, pybind11::arg("code") = pybind11::none());
  m.def(
      "plan_assign",
      [](int64_t B, int64_t N, int64_t J, int64_t C, int64_t centres, const std::string& dtype, bool in_place,
         int32_t major, int32_t minor, int32_t multiprocessors) {
        const h2ot::cuda::Problem problem = {B, N, J, C, 0, dtype_named(dtype), in_place, centres};
        return described(plan_assign(problem, {major, minor, multiprocessors}));
      },
      "The same for labels by `centres` given tokens.", pybind11::arg("B"), pybind11::arg("N"), pybind11::arg("J"),
      pybind11::arg("C"), pybind11::arg("centres"), pybind11::arg("dtype"), pybind11::arg("in_place") = false,
      pybind11::arg("major") = 9, pybind11::arg("minor") = 0, pybind11::arg("multiprocessors") = 132);
  m.def(
      "plan_tile",
      [](int64_t number, int64_t ratio) {
        const h2ot::cuda::Tile tile = h2ot::cuda::tile_of(number, ratio);
        return pybind11::make_tuple(tile.row, tile.column);
      },
      "(row, column) of a tile of the upper triangle, `ratio` row tiles per column tile.", pybind11::arg("number"),
      pybind11::arg("ratio"));
}
