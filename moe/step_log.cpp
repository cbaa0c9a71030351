#include "moe/step_log.h"

#include <algorithm>
#include <cstdio>

#include "moe/report.h"

double max_over_mean(const std::vector<std::vector<int32_t>>& load) {
  double worst = 0;
  for (const auto& layer : load) {
    int64_t sum = 0, largest = 0;
    for (int32_t n : layer) sum += n, largest = std::max<int64_t>(largest, n);
    if (sum) worst = std::max(worst, double(largest) * double(layer.size()) / double(sum));
  }
  return worst;
}

nlohmann::ordered_json step_record(const StepReport& r) {
  nlohmann::ordered_json j{{"step", r.step},
                           {"loss", r.stats.loss},
                           {"aux_loss", r.stats.aux_loss},
                           {"z_loss", r.stats.z_loss},
                           {"lr", r.learning_rate},
                           {"grad_norm", r.stats.grad_norm},
                           {"clip", r.stats.clip},
                           {"ms", r.milliseconds},
                           {"tokens_per_s", r.tokens_per_s},
                           {"mfu", r.mfu},
                           {"memory_bytes", r.memory_bytes},
                           {"load_max_over_mean", max_over_mean(r.expert_load)},
                           {"loss_z", r.stats.loss_z},
                           {"norm_z", r.stats.norm_z}};
  if (!r.skipped.empty()) j["skipped"] = r.skipped;
  j["expert_load"] = r.expert_load;
  return j;
}

EventSummary step_event(const StepReport& r) {
  EventSummary e;
  e.scalar("loss", r.stats.loss).scalar("aux_loss", r.stats.aux_loss).scalar("z_loss", r.stats.z_loss);
  e.scalar("lr", r.learning_rate).scalar("grad_norm", r.stats.grad_norm).scalar("tokens_per_s", r.tokens_per_s);
  e.scalar("load_max_over_mean", max_over_mean(r.expert_load));
  if (r.step % std::max<int64_t>(1, r.total_steps / 500) == 0 || r.step == r.total_steps)
    for (size_t l = 0; l < r.expert_load.size(); ++l)
      e.counts("expert_load/layer_" + std::to_string(l), r.expert_load[l]);
  return e;
}

std::string step_line(const StepReport& r, int64_t last_step) {
  char text[320];
  int n = std::snprintf(text, sizeof text,
                        "step %5lld/%lld | loss %.9g | aux %.6g z %.6g | load %.2f | norm %.4f | lr %.3e | %.1f ms | "
                        "%.0f tok/s | %.1f%% of peak | %s",
                        (long long)r.step, (long long)r.total_steps, r.stats.loss, r.stats.aux_loss, r.stats.z_loss,
                        max_over_mean(r.expert_load), r.stats.grad_norm, r.learning_rate, r.milliseconds,
                        r.tokens_per_s, 100 * r.mfu, readable_bytes(double(r.memory_bytes)).c_str());
  std::string line(text, std::min<size_t>(size_t(n), sizeof text - 1));
  if (last_step) {
    auto seconds = int64_t(double(last_step - r.step) * r.milliseconds / 1000);
    line += " | " + std::to_string(seconds / 60) + "m" + std::to_string(seconds % 60) + "s left";
  }
  if (!r.skipped.empty()) line += " | update skipped: " + r.skipped;
  return line;
}

double training_flops_per_token(const ModelConfig& c, int64_t T) {
  return 6.0 * double(c.active_parameters()) + 6.0 * double(c.n_layer) * double(T) * double(c.heads().q_width());
}
