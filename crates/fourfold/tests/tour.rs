//! `fourfold tour` as a newcomer sees it: the recorded transcript, with what changes from run to
//! run (host addresses, times) taken out of both. `BLESS=1` records it anew.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

fn tour(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_fourfold"))
        .arg("tour")
        .args(arguments)
        .output()
        .unwrap()
}

/// A line without what changes from run to run.
fn normal(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.first() == Some(&"hpa") {
        return "hpa PLACE".to_owned();
    }
    let second_level = line.contains("second level, level");
    let mut out = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let before = index.checked_sub(1).map_or("", |i| words[i]);
        let after = words.get(index + 1).copied().unwrap_or("");
        let host = before == "hva" || second_level && word.starts_with("0x");
        out.push(match word {
            _ if is_unit(after) => "TIME",
            _ if is_unit(word) => "UNIT",
            _ if host => "HOST",
            word => word,
        });
    }
    out.join(" ")
}

/// A unit of time, maybe with the end of a sentence.
fn is_unit(word: &str) -> bool {
    ["ns", "us", "ms"].contains(&word.trim_end_matches([',', '.', ':']))
}

#[test]
fn it_tells_the_recorded_story() {
    let began = Instant::now();
    let output = tour(&[]);
    let took = began.elapsed();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let told: Vec<String> = text.lines().map(normal).collect();
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts/tour.txt");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&recorded, &text).unwrap();
    }
    let wanted = fs::read_to_string(&recorded).unwrap();
    let wanted: Vec<String> = wanted.lines().map(normal).collect();
    assert_eq!(told, wanted);
    // A slow machine under load is no fault of ours, an endless loop is.
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn json_says_what_the_text_says() {
    let output = tour(&["--json"]);
    let tour: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let story = &tour["story"];
    assert_eq!(story["first"]["before"]["guest"]["gpa"], "0x200000");
    assert_eq!(story["first"]["faults"][0]["cause"], "NotPresent");
    assert_eq!(story["second"]["faults"].as_array().unwrap().len(), 0);
    assert_eq!(story["device"]["buffer"], "from the");
    assert_eq!(story["dirty"]["frames"], serde_json::json!([0x6, 0x200]));
    let paths: Vec<_> = tour["others"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["paging"].clone())
        .collect();
    assert_eq!(paths, ["shadow", "direct"]);
}

#[test]
fn the_kernels_kvm_shows_what_can_be_seen_from_outside() {
    let output = tour(&["--accel", "kvm"]);
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(std::env::var_os("REQUIRE_KVM").is_none(), "{why}");
        assert!(why.contains("can't be used"), "{why}");
        eprintln!("skipped: {why}");
        return;
    }
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("cannot be seen from outside"), "{text}");
    assert!(text.contains("0x6 0x200"), "{text}");
}
