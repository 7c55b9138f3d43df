//! The document in docs/ is the one that the code makes.

use std::{fs, path::Path};

#[test]
fn the_document_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/openapi.json");
    let made = format!(
        "{}\n",
        serde_json::to_string_pretty(&control::document()).unwrap()
    );
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    assert!(
        committed == made,
        "docs/openapi.json is not what the code says: `BLESS=1 cargo test -p control` writes it anew"
    );
    for path in ["/status", "/explain", "/map", "/faults", "/memory"] {
        assert!(made.contains(&format!("\"{path}\"")), "{path}");
    }
}
