// Learning rate as a pure function of the step: nothing to save, nothing to restore.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <string_view>

#include "llmc/error.h"

enum class ScheduleKind { cosine, linear, constant, wsd };

struct Schedule {
  ScheduleKind kind = ScheduleKind::cosine;
  double peak = 3e-4;               // learning rate at the end of the warm-up
  int64_t warmup_steps = 0;         // step s of the warm-up has peak * (s + 1) / warmup_steps, so step 0 is not wasted
  int64_t total_steps = 0;          // length of the whole schedule, warm-up included
  double final_fraction = 0;        // of the peak, reached at total_steps; unused by constant
  double wsd_decay_fraction = 0.2;  // wsd: part of total_steps, at its end, in which the rate falls
};

// "cosine", "linear", "constant", "wsd"; anything else is an Error.
inline ScheduleKind parse_schedule_kind(std::string_view name) {
  if (name == "cosine") return ScheduleKind::cosine;
  if (name == "linear") return ScheduleKind::linear;
  if (name == "constant") return ScheduleKind::constant;
  if (name == "wsd") return ScheduleKind::wsd;
  fail("unknown learning rate schedule '", name, "': choose cosine, linear, constant or wsd");
}

// Error for values that make no schedule (NaN included).
inline void check_schedule(const Schedule& s) {
  if (!(s.peak >= 0) || !std::isfinite(s.peak)) fail("learning rate ", s.peak, ": must be a finite number >= 0");
  if (s.total_steps < 0) fail("schedule of ", s.total_steps, " steps: must be >= 0");
  if (s.warmup_steps < 0 || s.warmup_steps > s.total_steps)
    fail("warm-up of ", s.warmup_steps, " steps: must be between 0 and the ", s.total_steps, " steps of the schedule");
  if (!(s.final_fraction >= 0 && s.final_fraction <= 1))
    fail("final fraction ", s.final_fraction, " of the learning rate: must be between 0 and 1");
  if (!(s.wsd_decay_fraction >= 0 && s.wsd_decay_fraction <= 1))
    fail("wsd decay fraction ", s.wsd_decay_fraction, ": must be between 0 and 1");
}

// The rate of step 0, 1, ... After the warm-up the rate falls from the peak (first step) towards peak * final_fraction
// (which step total_steps would have, and every later one has): along half a cosine or a straight line. constant stays
// at the peak. wsd (warm-up, stable, decay) stays there too until the last wsd_decay_fraction * total_steps steps, in
// which it falls along a straight line; a decay longer than what the warm-up leaves is cut to that.
inline double learning_rate(const Schedule& s, int64_t step) {
  if (step < s.warmup_steps) return s.peak * double(step + 1) / double(s.warmup_steps);
  if (s.kind == ScheduleKind::constant) return s.peak;
  int64_t begin = s.warmup_steps;  // of the decay
  if (s.kind == ScheduleKind::wsd)
    begin = std::max(begin, s.total_steps - int64_t(std::llround(s.wsd_decay_fraction * double(s.total_steps))));
  double progress = 0;
  if (step >= s.total_steps)
    progress = 1;
  else if (step > begin)
    progress = double(step - begin) / double(s.total_steps - begin);
  double remaining = s.kind == ScheduleKind::cosine ? 0.5 * (1 + std::cos(std::numbers::pi * progress)) : 1 - progress;
  return s.peak * (s.final_fraction + (1 - s.final_fraction) * remaining);
}
