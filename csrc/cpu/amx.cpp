#include "csrc/cpu/amx.h"

#include <cerrno>
#include <cstring>

#include "csrc/cpu/runnable.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmk {
namespace {

#if defined(__x86_64__) && defined(__linux__)
int ask_for_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
}
#else
int ask_for_tiles() { return ENOSYS; }
#endif

#ifdef MMK_AMX
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;
#endif

}  // namespace

std::string why_no_amx(bool compiled, bool cpu_has_it, int refused) {
  if (!cpu_has_it) return "this CPU has none";
  if (!compiled) return "the library was built without them";
  if (refused != 0) return std::string("the system refuses them: ") + std::strerror(refused);
  return "";
}

const std::string& why_no_amx() {
  static const std::string reason = [] {
    const bool has_it = is_runnable("amx");
    return why_no_amx(kCompiled, has_it, kCompiled && has_it ? ask_for_tiles() : 0);
  }();
  return reason;
}

}  // namespace mmk
