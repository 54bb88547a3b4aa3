//! Finds an installed Express by pkg-config.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    let tool = std::env::var("PKG_CONFIG").unwrap_or_else(|_| "pkg-config".into());
    let run = Command::new(&tool).args(["--libs", "express >= 1.1"]).output();
    let output = match run {
        Ok(output) if output.status.success() => output.stdout,
        Ok(output) => panic!(
            "pkg-config does not find express >= 1.1: install it, and set PKG_CONFIG_PATH if it is not in a standard place\n{}",
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("cannot run {tool}: {error}"),
    };
    for flag in String::from_utf8_lossy(&output).split_whitespace() {
        if let Some(path) = flag.strip_prefix("-L") {
            println!("cargo:rustc-link-search=native={path}");
        } else if let Some(library) = flag.strip_prefix("-l") {
            println!("cargo:rustc-link-lib={library}");
        }
    }
}
