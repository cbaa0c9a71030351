// The rate that a share of the machine's peak is measured against.
#pragma once
#include "llmc/device.h"

// Operations a second of the best of a few dense products (1024 x 1024 x 1024) on all threads: what this machine's
// matmul library reaches, measured in about a tenth of a second.
template <class Device>
double peak_flops(Device& dev);
