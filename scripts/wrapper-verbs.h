/* What softefa/preload/src/verbs.rs is generated from; see scripts/bindings-verbs. */
#include <infiniband/verbs.h>
#include <infiniband/efadv.h>
