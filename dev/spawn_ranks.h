// Starts this program again, as the ranks of a job on this machine that find each other over TCP (llmc/comm.h): for tests
// and benchmarks of several processes that one command runs.
#pragma once
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "llmc/error.h"

inline bool is_spawned_rank() { return std::getenv("SPAWNED_RANK") != nullptr; }

// One that nobody listens at, below those (32768 and up) that the system gives to outgoing connections: such a one could be
// taken before the first rank listens there.
inline int free_port() {
  std::random_device random;
  for (int attempt = 0; attempt < 1000; ++attempt) {
    const int port = 20000 + int(random() % 12768), fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET, address.sin_addr.s_addr = htonl(INADDR_LOOPBACK), address.sin_port = htons(port);
    const bool free = fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    if (fd >= 0) close(fd);
    if (free) return port;
  }
  fail("no free port on this machine");
}

// The exit status of each of n ranks, which run with these arguments for `seconds` at most.
inline std::vector<int> spawn_ranks(int n, std::vector<std::string> args, unsigned seconds) {
  const int port = free_port();
  std::vector<pid_t> pids;
  for (int r = 0; r < n; ++r) {
    const pid_t pid = fork();
    if (pid < 0) fail("cannot start a process");
    if (pid) {
      pids.push_back(pid);
      continue;
    }
    for (const char* other : {"OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMIX_RANK"}) unsetenv(other);
    setenv("SPAWNED_RANK", "1", 1), setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("RANK", std::to_string(r).c_str(), 1), setenv("WORLD_SIZE", std::to_string(n).c_str(), 1);
    setenv("MASTER_PORT", std::to_string(port).c_str(), 1);
    setenv("OMP_NUM_THREADS", "1", 0);  // ranks that each took all processors would wait for each other's threads
    args.insert(args.begin(), "rank");
    std::vector<char*> argv;
    for (std::string& a : args) argv.push_back(a.data());
    argv.push_back(nullptr);
    alarm(seconds);
    execv("/proc/self/exe", argv.data());
    _exit(127);
  }
  std::vector<int> statuses;
  for (pid_t pid : pids) {
    int status = 0;
    waitpid(pid, &status, 0);
    statuses.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }
  return statuses;
}
