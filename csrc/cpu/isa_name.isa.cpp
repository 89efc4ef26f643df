// The name of an instruction set, by which the library knows that it was linked with its kernels.
#include "csrc/cpu/isa.h"

#define MMK_TEXT(x) #x
#define MMK_TEXT_OF(x) MMK_TEXT(x)

namespace mmk {
namespace MMK_ISA {

const char* isa_name() { return MMK_TEXT_OF(MMK_ISA); }

}  // namespace MMK_ISA
}  // namespace mmk
