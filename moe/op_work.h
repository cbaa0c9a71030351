// What each op of a training step has to do, from shapes: the one place that says so. Profiles hold times against it, and
// the cost of recomputation is a sum of it.
#pragma once
#include <map>
#include <string>

#include "moe/run_options.h"

// Floating-point operations of matrix products (a multiply-add is two), and bytes read and written if every tensor passes
// once. 0: nothing worth naming, or not known from shapes.
struct OpWork {
  double flops = 0, bytes = 0;
  OpWork& operator+=(const OpWork& o) { return flops += o.flops, bytes += o.bytes, *this; }
  // The least time that this can take, in ms, at so many operations and bytes a second.
  double floor_ms(double flops_per_s, double bytes_per_s) const;
};

// Of the ops of a plan, on one rank. Rows of experts that are spread over ranks are counted as if they were in balance, and
// none of a further pass. Bytes are those of the tensors that the plan says an op is given, but where an op reads some
// rows alone. Of communication the time depends on the other ranks: no work is named.
class OpWorks {
 public:
  // real_bytes: of an element of the storage type.
  OpWorks(const ModelConfig& config, const RunOptions& run, const Plan& plan, size_t real_bytes);
  OpWork operator()(const PlannedOp& op) const;

  // Of a micro-step: operations in all but what is recomputed, and those of recomputation.
  struct Operations {
    double step = 0, recomputed = 0;
    double share() const { return step > 0 ? recomputed / step : 0; }
  };
  Operations operations() const;

 private:
  double mlp_flops(const std::string& op, int layer) const;

  const ModelConfig& config_;
  const Plan& plan_;
  double N_, C_;  // tokens of a micro-batch, of all ranks that share it
  int tp_;        // ranks that do
  std::map<std::string, double> flops_, bytes_;
};

// Whether an op is communication with other ranks (or waits for them).
bool communicates(const std::string& op);
