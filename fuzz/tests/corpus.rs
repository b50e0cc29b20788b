//! The fuzzers' corpora, as an ordinary test on any toolchain.

use std::path::Path;

// One test, nothing beside it: `capi` counts the process's open files.
#[test]
fn every_target_takes_its_corpus() {
    for (name, target) in mooncake_efa_fuzz::TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut count = 0;
        for input in std::fs::read_dir(&corpus).expect("a corpus") {
            let input = input.expect("an entry").path();
            // Shown if it fails.
            println!("{}", input.display());
            target(&std::fs::read(&input).expect("a file"));
            count += 1;
        }
        assert!(count > 0, "no input in {}", corpus.display());
    }
}
