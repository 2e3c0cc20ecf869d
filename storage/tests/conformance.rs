//! The suite on every backend.

use im_storage::{Embedded, EmbeddedOptions, Memory, Store, conformance};

#[tokio::test]
async fn memory_conforms() {
    conformance::all(&Store::from(Memory::new())).await;
}

#[tokio::test]
async fn embedded_conforms_also_after_it_was_opened_again() {
    let directory = tempfile::tempdir().expect("a directory");
    for blob_threshold_bytes in [None, Some(1024)] {
        let path = directory.path().join(format!("{blob_threshold_bytes:?}"));
        let options = EmbeddedOptions { blob_threshold_bytes, ..EmbeddedOptions::default() };
        let store = Embedded::open(&path, options.clone()).expect("opens");
        conformance::all(&Store::from(store.clone())).await;
        store.close();
        drop(store);
        let store = Embedded::open(&path, options).expect("opens again");
        conformance::again(&Store::from(store)).await;
    }
}
