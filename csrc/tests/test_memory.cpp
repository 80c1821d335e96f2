// Memory of packed weights: lines, blocks that small buffers share, what the system does not give, and forks.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "common/pack.h"
#include "tests/check.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

void buffers_do_not_overlap() {
  std::vector<std::unique_ptr<WeightBuffer>> buffers;
  for (const size_t bytes : {0, 1, 63, 64, 65, 4096, 17 << 20, 5 << 20, 3})
    buffers.push_back(std::make_unique<WeightBuffer>(bytes));
  for (size_t i = 0; i < buffers.size(); i++) {
    expect(reinterpret_cast<uintptr_t>(buffers[i]->data()) % 64 == 0, "a buffer is not on a line");
    if (buffers[i]->size()) std::memset(buffers[i]->data(), static_cast<int>(i), buffers[i]->size());
  }
  for (size_t i = 0; i < buffers.size(); i++) {
    bool whole = true;
    for (size_t j = 0; j < buffers[i]->size(); j++) whole &= buffers[i]->data()[j] == static_cast<char>(i);
    expect(whole, "two buffers overlap");
  }
}

void too_much_is_said() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which end the program there
  std::string said;
  try {
    WeightBuffer buffer(size_t{1} << 50);
  } catch (const OutOfMemory& error) {
    said = error.what();
  }
  expect(said.find("1073741824 MiB") != std::string::npos, "an error without the size: " + said);
#endif
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer cannot follow a fork of several threads
// While one thread packs, a child of another packs too.
void forks_while_packing() {
  std::atomic<bool> stop{false};
  std::thread packer([&] {
    const WeightBuffer first(64);  // keeps the block
    while (!stop) WeightBuffer buffer(64);
  });
  bool good = true;
  for (int i = 0; i < 50 && good; i++) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(5);
      WeightBuffer buffer(100);
      _exit(buffer.data() ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  stop = true;
  packer.join();
  expect(good, "a forked child could not pack");
}
#endif

}  // namespace

int main() {
  buffers_do_not_overlap();
  too_much_is_said();
#if !defined(__SANITIZE_THREAD__)
  forks_while_packing();
#endif
  return finish("memory");
}
