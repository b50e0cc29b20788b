#include <mooncake_efa.h>
#include <stdio.h>

int main(void) {
    printf("C: ABI version %u\n", (unsigned)mefa_abi_version());
    return mefa_abi_version() == 0;
}
