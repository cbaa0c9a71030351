#include "llmc/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "llmc/error.h"

void check_sampler(const SamplerOptions& options) {
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    fail("temperature ", options.temperature, ": must be a finite number >= 0 (0 takes the likeliest token)");
  if (options.top_k < 0) fail("top-k ", options.top_k, ": must be >= 0 (0 considers every token)");
  if (!(options.top_p > 0 && options.top_p <= 1)) fail("top-p ", options.top_p, ": must be in (0, 1]");
}

int32_t sample_token(std::span<const float> logits, const SamplerOptions& options, double uniform) {
  check_sampler(options);
  if (logits.empty()) fail("sampling: no logits");
  if (!(uniform >= 0 && uniform < 1)) fail("sampling: uniform number ", uniform, " is not in [0, 1)");
  for (size_t i = 0; i < logits.size(); i++)
    if (!std::isfinite(logits[i]))
      fail("sampling: the logit of token ", i, " is ", logits[i], ": has training diverged?");

  int32_t best = int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());  // the first of equals
  if (options.temperature == 0) return best;

  // The candidates: every token, in order of id, unless a filter needs the likeliest first.
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  bool top_k = options.top_k > 0 && size_t(options.top_k) < ids.size();
  if (top_k || options.top_p < 1) {
    auto likelier = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    size_t kept = top_k ? size_t(options.top_k) : ids.size();
    std::partial_sort(ids.begin(), ids.begin() + ptrdiff_t(kept), ids.end(), likelier);
    ids.resize(kept);
  }
  // Weights relative to the likeliest token, whose weight is 1, so that the sum is never 0.
  std::vector<double> weight(ids.size());
  for (size_t i = 0; i < ids.size(); i++)
    weight[i] = std::exp((double(logits[ids[i]]) - double(logits[best])) / options.temperature);
  double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  if (options.top_p < 1) {
    double nucleus = 0;
    size_t kept = 0;
    while (kept < ids.size() && nucleus < options.top_p * total) nucleus += weight[kept++];
    ids.resize(kept);
    total = nucleus;
  }

  // The token in whose part of [0, total) the number falls. Rounding may leave it at the very end: the last token of
  // any weight.
  double target = uniform * total, sum = 0;
  int32_t chosen = best;
  for (size_t i = 0; i < ids.size(); i++) {
    if (weight[i] == 0) continue;
    chosen = ids[i];
    sum += weight[i];
    if (sum > target) break;
  }
  return chosen;
}
