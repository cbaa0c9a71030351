// The order of work in a pipeline, as data: stages that hand each other micro-batches over transfers that wait for the
// other side.
#include "moe/pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>

namespace {

using Schedule = std::vector<PipelineAction>;
std::vector<Schedule> schedules(int stages, int64_t micro_steps) {
  std::vector<Schedule> all;
  for (int s = 0; s < stages; ++s) all.push_back(pipeline_schedule(s, stages, micro_steps));
  return all;
}

// Runs the stages side by side. An action begins once its stage is through with the one before; it passes on what it
// sends and receives when both sides are at it, in any order, and then its program runs.
struct Simulation {
  static constexpr double forward_time = 1, backward_time = 2;
  std::vector<Schedule> stages;
  std::vector<size_t> at;           // action of each stage
  std::vector<std::set<int>> done;  // transfers of it, by field
  std::vector<double> clock;

  explicit Simulation(std::vector<Schedule> s) : stages(std::move(s)) {
    at.resize(stages.size()), done.resize(stages.size()), clock.resize(stages.size());
  }
  static constexpr int64_t PipelineAction::*fields[] = {&PipelineAction::send_output, &PipelineAction::receive_input,
                                                        &PipelineAction::send_gradient,
                                                        &PipelineAction::receive_gradient};

  const PipelineAction* action(int stage) const {
    const bool there = stage >= 0 && stage < int(stages.size()) && at[stage] < stages[stage].size();
    return there ? &stages[stage][at[stage]] : nullptr;
  }
  // Passes what `from` is about to send, if the other side is about to receive it. Fields: of send and receive.
  bool meet(int from, int to, int send, int receive, std::vector<double>& arrival) {
    const PipelineAction *a = action(from), *b = action(to);
    if (!a || !b || a->*fields[send] < 0 || b->*fields[receive] < 0) return false;
    if (done[from].contains(send) || done[to].contains(receive)) return false;
    EXPECT_EQ(a->*fields[send], b->*fields[receive]) << "another micro-batch than the neighbour expects";
    done[from].insert(send), done[to].insert(receive);
    const double met = std::max(clock[from], clock[to]);
    arrival[from] = std::max(arrival[from], met), arrival[to] = std::max(arrival[to], met);
    return true;
  }
  // Whether all stages come to their end; visit(stage, action) is called when an action is complete.
  template <class Visit>
  bool run(Visit visit) {
    std::vector<double> arrival = clock;
    for (bool progress = true; progress;) {
      progress = false;
      for (int s = 0; s < int(stages.size()); ++s) {
        progress |= meet(s, s + 1, 0, 1, arrival) | meet(s + 1, s, 2, 3, arrival);
        const PipelineAction* a = action(s);
        if (!a) continue;
        size_t pieces = 0;
        for (auto field : fields) pieces += a->*field >= 0;
        if (done[s].size() < pieces) continue;
        clock[s] = std::max(clock[s], arrival[s]) + (a->forward >= 0 ? forward_time : 0) +
                   (a->backward >= 0 ? backward_time : 0);
        visit(s, *a);
        ++at[s], done[s].clear(), progress = true;
      }
    }
    for (int s = 0; s < int(stages.size()); ++s)
      if (action(s)) return false;
    return true;
  }
};

Stage stage_with(int stage, int stages, int64_t micro_steps) {
  ModelConfig model;
  model.n_layer = stages;
  RunOptions run;
  run.parallel.layout.pp = stages, run.parallel.here = place(run.parallel.layout, stage);
  run.micro_steps = micro_steps;
  return stage_of(model, run);
}

// What a stage has in its memory at a time.
struct Memory {
  std::vector<std::optional<int64_t>> input, saved;  // by slot
  std::optional<int64_t> output, gradient;
  bool gradient_is_of_input = false;
  int64_t forwards = 0, backwards = 0;
  int most = 0;

  int held() const {
    return int(std::ranges::count_if(saved, [](auto& s) { return s.has_value(); }));
  }
};

TEST(Pipeline, EveryMicroBatchPassesAllStagesInOrder) {
  for (int stages = 1; stages <= 7; ++stages)
    for (int64_t micro_steps = 1; micro_steps <= 16; ++micro_steps) {
      SCOPED_TRACE(std::to_string(stages) + " stages, " + std::to_string(micro_steps) + " micro-batches");
      std::vector<Memory> memory(stages);
      std::vector<Stage> stage;
      for (int s = 0; s < stages; ++s) {
        stage.push_back(stage_with(s, stages, micro_steps));
        EXPECT_EQ(stage[s].slots, std::min<int64_t>(stages - s, micro_steps));
        memory[s].input.resize(stage[s].slots), memory[s].saved.resize(stage[s].slots);
      }
      Simulation simulation(schedules(stages, micro_steps));
      ASSERT_TRUE(simulation.run([&](int s, const PipelineAction& a) {
        Memory& m = memory[s];
        ASSERT_FALSE(a.forward >= 0 && a.backward >= 0);
        ASSERT_FALSE(a.send_gradient >= 0 && a.receive_gradient >= 0) << "there is one buffer";
        if (a.send_output >= 0) {
          ASSERT_EQ(m.output, a.send_output);
          m.output.reset();
        }
        if (a.send_gradient >= 0) {
          ASSERT_TRUE(m.gradient_is_of_input);
          ASSERT_EQ(m.gradient, a.send_gradient);
          m.gradient.reset();
        }
        if (a.receive_gradient >= 0) {
          ASSERT_FALSE(m.gradient) << "overwritten before it is sent";
          m.gradient = a.receive_gradient, m.gradient_is_of_input = false;
        }
        if (a.receive_input >= 0) {
          const int slot = stage[s].slot(a.receive_input);
          ASSERT_FALSE(m.saved[slot] || m.input[slot]) << "the slot is in use";
          m.input[slot] = a.receive_input;
        }
        if (a.forward >= 0) {
          const int slot = stage[s].slot(a.forward);
          ASSERT_EQ(a.forward, m.forwards++);
          if (!stage[s].first()) { ASSERT_EQ(m.input[slot], a.forward); }
          ASSERT_FALSE(m.saved[slot] || m.output);
          m.saved[slot] = a.forward;
          if (!stage[s].last()) m.output = a.forward;
          m.most = std::max(m.most, m.held());
        }
        if (a.backward >= 0) {
          const int slot = stage[s].slot(a.backward);
          ASSERT_EQ(a.backward, m.backwards++);
          ASSERT_EQ(m.saved[slot], a.backward);
          if (!stage[s].last()) { ASSERT_EQ(m.gradient, a.backward); }
          m.saved[slot].reset(), m.input[slot].reset();
          m.gradient = a.backward, m.gradient_is_of_input = true;
          if (stage[s].first()) m.gradient.reset();
        }
      })) << "stages wait for each other";
      for (int s = 0; s < stages; ++s) {
        EXPECT_EQ(memory[s].forwards, micro_steps);
        EXPECT_EQ(memory[s].backwards, micro_steps);
        EXPECT_EQ(memory[s].most, stage[s].slots) << "not all slots are needed";
        EXPECT_FALSE(memory[s].output || memory[s].gradient);
      }
      // No stage idles longer than the pipeline takes to fill and to drain.
      const double longest = *std::ranges::max_element(simulation.clock);
      EXPECT_EQ(longest, double(micro_steps + stages - 1) * (Simulation::forward_time + Simulation::backward_time));
    }
}

// What the schedule is careful about: a send and a receive one after the other, on both sides, never end.
TEST(Pipeline, SendsByThemselvesWouldNeverEnd) {
  std::vector<Schedule> apart = schedules(3, 6);
  for (Schedule& schedule : apart) {
    Schedule split;
    for (PipelineAction a : schedule) {
      PipelineAction sends;
      std::swap(sends.send_output, a.send_output), std::swap(sends.send_gradient, a.send_gradient);
      if (sends.send_output >= 0 || sends.send_gradient >= 0) split.push_back(sends);
      split.push_back(a);
    }
    schedule = split;
  }
  EXPECT_FALSE(Simulation(apart).run([](int, const PipelineAction&) {}));
}

// Programs of two slots: what a forward program leaves for its backward program is not where any of the four puts
// something else, whatever their order. What they do not leave, and another program's tensors, share memory.
TEST(Pipeline, WhatPassesBetweenProgramsHasAPlaceOfItsOwn) {
  Cpu<float> dev;
  Plan plan;
  Executor<Cpu<float>> x(dev, plan);
  void (*op)(Cpu<float>&, float*, float*) = [](Cpu<float>&, float*, float*) {};
  for (int slot = 0; slot < 2; ++slot) {
    x.begin(2 * slot);
    auto kept = x.tensor<float>("kept", {100}), temporary = x.tensor<float>("temporary", {1000});
    x.op("forward", op, kept, temporary);
    x.begin(2 * slot + 1);
    auto other = x.tensor<float>("temporary", {1000});
    x.op("backward", op, other, kept);
  }
  x.interleave(0, 3);
  x.begin(4);
  auto later = x.tensor<float>("later", {500});
  x.op("update", op, later, later);
  plan.place();
  auto apart = [](const TensorInfo& a, const TensorInfo& b) {
    return a.offset + a.bytes <= b.offset || b.offset + b.bytes <= a.offset;
  };
  int pairs = 0;
  for (const TensorInfo& a : plan.tensors())
    for (const TensorInfo& b : plan.tensors())
      if (&a != &b && a.name == "kept" && b.name != "later") {
        EXPECT_TRUE(apart(a, b)) << b.name;
        ++pairs;
      }
  EXPECT_EQ(pairs, 10);
  EXPECT_EQ(plan.arena_bytes(), 4096 + 2 * 512u);  // rounded up to multiples of 256
}

TEST(Pipeline, OneStageTakesTurns) {
  const Schedule alone = pipeline_schedule(0, 1, 3);
  ASSERT_EQ(alone.size(), 6u);
  for (int64_t m = 0; m < 3; ++m) {
    EXPECT_EQ(alone[2 * m].forward, m);
    EXPECT_EQ(alone[2 * m + 1].backward, m);
  }
}

}  // namespace
