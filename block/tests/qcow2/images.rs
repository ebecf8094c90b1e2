//! Images for the tests, and what QEMU's programs say of them.

use std::path::Path;
use std::process::Command;

use blockport_block::drivers::qcow2::{CreateOptions, check, new_image};

use crate::testing::opened;

/// Makes an image.
pub fn create(path: &str, options: &CreateOptions) {
    let bytes = new_image(options).unwrap_or_else(|error| panic!("{options:?}: {error}"));
    std::fs::write(path, bytes).expect("the directory is writable");
}

/// A raw image with random content.
pub fn create_raw(path: &str, content: &[u8]) {
    std::fs::write(path, content).expect("the directory is writable");
}

/// Runs one of QEMU's programs. `None`, and a note, where this machine has none.
pub fn qemu(program: &str, arguments: &[&str]) -> Option<Result<String, String>> {
    let provided = std::env::var("BLOCKPORT_PROVISION").map(|place| format!("{place}/programs/{program}"));
    let command = provided.ok().filter(|path| Path::new(path).exists()).unwrap_or_else(|| program.to_owned());
    let output = match Command::new(command).args(arguments).output() {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIP comparison-with-{program}: {error}");
            return None;
        }
    };
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = format!("{out}{}", String::from_utf8_lossy(&output.stderr));
    Some(if output.status.success() {
        Ok(out)
    } else {
        Err(format!("{program} {arguments:?}: {}{all}", output.status))
    })
}

/// Runs qemu-img, which must succeed. False where there is none.
pub fn qemu_img(arguments: &[&str]) -> bool {
    match qemu("qemu-img", arguments) {
        Some(result) => {
            result.unwrap_or_else(|error| panic!("{error}"));
            true
        }
        None => false,
    }
}

/// Neither an error nor a leak, for QEMU and for us.
pub fn check_clean(path: &str) {
    {
        let (_graph, node) = opened(&format!("qcow2,read-only=on,file.driver=file,file.filename={path}"));
        let report = check(&node, false).expect("it can be read");
        assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
    }
    qemu_img(&["check", "-q", "-f", "qcow2", path]);
}

/// No error; leaks do no harm.
pub fn check_at_most_leaks(path: &str) {
    match qemu("qemu-img", &["check", "-q", "-f", "qcow2", path]) {
        // 3: leaks, and nothing else.
        Some(Err(error)) if !error.contains("exit status: 3") => panic!("{error}"),
        _ => {}
    }
}

/// The guest sees this content.
pub fn compare(path: &str, content: &[u8]) {
    let expected = format!("{path}.expected");
    create_raw(&expected, content);
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", &expected, path]);
    std::fs::remove_file(expected).expect("it was just made");
}
