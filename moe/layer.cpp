#include "moe/layer.h"

const char* name_of(Recompute r) {
  static const char* names[] = {"none", "act", "up", "block"};
  return names[int(r)];
}
const char* name_of(Dispatch d) { return d == Dispatch::zero_buffer ? "zero_buffer" : "materialized"; }
