//! `blockport manual`: the manual page, made from the definitions of the command line.
//!
//! This file owns the page's order and the sections that no option explains. The text of the options stands with the
//! options. `docs/blockport.1` is this command's output, and a test here says when it is not.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_mangen::Man;

use crate::options::{Cli, EXAMPLES};

/// How every rendering begins: the apostrophe's definition for this and for old formatters.
const PREAMBLE: [&str; 2] = [r".ie \n(.g .ds Aq \(aq", r".el .ds Aq '"];

/// The whole page, in roff.
pub fn page() -> String {
    let mut command = Cli::command();
    command.build();
    let commands: Vec<clap::Command> =
        command.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    // No date: the page must not change unless the options do.
    let version = format!("blockport {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command).title("BLOCKPORT").date("").source(version).manual("User Commands");

    let mut page = PREAMBLE.map(|line| format!("{line}\n")).concat();
    page += &rendered(|out| man.render_title(out));
    page += &rendered(|out| man.render_name_section(out));
    page += &rendered(|out| man.render_synopsis_section(out));
    page += &rendered(|out| man.render_description_section(out));
    page += &rendered(|out| man.render_options_section(out));
    for command in commands {
        let name = format!("blockport {}", command.get_name());
        let verbs = if command.has_subcommands() { verbs(&command, "") } else { String::new() };
        let man = Man::new(command.display_name(&name).bin_name(&name));
        let heading = format!(".SH \"{}\"\n", name.to_uppercase());
        page += &rendered(|out| man.render_description_section(out)).replace(".SH DESCRIPTION\n", &heading);
        page += &rendered(|out| man.render_options_section(out)).replace(".SH ", ".SS ");
        if !verbs.is_empty() {
            page += &format!(".SS VERBS\n{verbs}");
        }
    }
    page += ".SH EXAMPLES\n";
    page += &verbatim(EXAMPLES);
    page
}

/// The verbs of a command, a paragraph each, with those of their groups.
fn verbs(command: &clap::Command, group: &str) -> String {
    let mut roff = String::new();
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        let name = format!("{group}{}", verb.get_name());
        if verb.has_subcommands() {
            roff += &verbs(verb, &format!("{name} "));
            continue;
        }
        let word = |arg: &clap::Arg| {
            let value = arg.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
            match (arg.get_long(), arg.get_action().takes_values(), arg.is_required_set()) {
                (Some(long), true, true) => format!("--{long} {value}"),
                (Some(long), true, false) => format!("[--{long} {value}]"),
                (Some(long), false, _) => format!("[--{long}]"),
                (None, _, true) => value,
                (None, _, false) => format!("[{value}]"),
            }
        };
        let known = |arg: &&clap::Arg| !arg.is_global_set() && arg.get_id() != "help";
        let words: Vec<String> = verb.get_arguments().filter(known).map(word).collect();
        let usage = format!("{name} {}", words.join(" ")).trim_end().replace('-', "\\-");
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default().replace('-', "\\-");
        roff += &format!(".TP\n\\fB{usage}\\fR\n{about}\n");
    }
    roff
}

/// What `render` writes, without the preamble that every rendering repeats; see [`PREAMBLE`].
fn rendered(render: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> String {
    let mut out = Vec::new();
    // Writing to memory does not fail.
    let _ = render(&mut out);
    let text = String::from_utf8_lossy(&out).into_owned();
    text.lines().filter(|line| !PREAMBLE.contains(line)).map(|line| format!("{line}\n")).collect()
}

/// Lines as they stand, in roff.
fn verbatim(text: &str) -> String {
    let mut roff = String::from(".nf\n");
    for line in text.lines() {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        // A dot or a quote at the start of a line would be a request.
        let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
        roff += &format!("{guard}{line}\n");
    }
    roff + ".fi\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_page_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/blockport.1");
        let committed = std::fs::read_to_string(path).expect(path);
        assert!(committed == page(), "docs/blockport.1 is not current: cargo run -- manual > docs/blockport.1");
    }

    #[test]
    fn every_option_is_on_the_page() {
        let page = page();
        let mut command = Cli::command();
        command.build();
        let serve = command.get_subcommands().find(|command| command.get_name() == "serve").expect("serve");
        for arg in command.get_arguments().chain(serve.get_arguments()).filter(|arg| !arg.is_hide_set()) {
            let Some(long) = arg.get_long() else { continue };
            let written = format!("\\-\\-{}", long.replace('-', "\\-"));
            assert!(page.contains(&written), "--{long}");
        }
    }
}
