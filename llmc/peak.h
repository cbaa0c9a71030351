// The rate that a share of the machine's peak is measured against.
#pragma once
#include "llmc/device.h"

// Operations a second of the best of a few dense products of random numbers: what this machine's matmul library reaches,
// measured in about a tenth of a second. On the CPU 1024 x 1024 x 1024, all threads; on a GPU the best of sizes up to
// 8192 x 8192 x 8192.
template <class Device>
double peak_flops(Device& dev);

// Bytes a second of the best of a few copies of more than caches hold, read and written bytes both counted: what memory
// gives, all threads on the CPU.
template <class Device>
double copy_bandwidth(Device& dev);
