#include <mooncake_efa.h>

#include <cstdio>

int main() {
    std::printf("C++: ABI version %u\n", static_cast<unsigned>(mefa_abi_version()));
    return mefa_abi_version() == 0;
}
