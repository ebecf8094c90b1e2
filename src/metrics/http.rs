//! HTTP, as much as a page of figures takes: what a request asks for, and what is answered.
//!
//! This file owns the bounds of a request and the form of an answer. It reads and writes no socket.

/// The most that a request may have before its end, in bytes.
pub const REQUEST_BYTES_MAX: usize = 8 << 10;

/// The form of the figures, as their readers know it.
const FIGURES: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What became of the bytes of a client so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// More is to come.
    Partial,
    /// It wants the figures; `body` false: only what stands before them.
    Figures {
        /// Whether the figures themselves are wanted.
        body: bool,
    },
    /// It gets this status and no figures.
    Refused(Status),
}

/// Why somebody gets no figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It is no HTTP.
    BadRequest,
    /// There is one page, and this is not it.
    NotFound,
    /// Nothing can be changed here.
    MethodNotAllowed,
    /// It does not end.
    TooLarge,
    /// A version that nobody speaks.
    Version,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
            Self::Version => "505 HTTP Version Not Supported",
        }
    }
}

/// Reads a request. What follows its head is nobody's business.
pub fn parse(bytes: &[u8]) -> Parsed {
    let Some(end) = end_of_head(bytes) else {
        return match bytes.len() > REQUEST_BYTES_MAX {
            true => Parsed::Refused(Status::TooLarge),
            false => Parsed::Partial,
        };
    };
    if end > REQUEST_BYTES_MAX {
        return Parsed::Refused(Status::TooLarge);
    }
    let Some(Ok(head)) = bytes.get(..end).map(std::str::from_utf8) else { return Parsed::Refused(Status::BadRequest) };
    let mut lines = head.lines();
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words.as_slice() else { return Parsed::Refused(Status::BadRequest) };
    match version.strip_prefix("HTTP/") {
        Some("1.0" | "1.1") => {}
        Some(_) => return Parsed::Refused(Status::Version),
        None => return Parsed::Refused(Status::BadRequest),
    }
    if !lines.all(|line| line.is_empty() || line.contains(':')) {
        return Parsed::Refused(Status::BadRequest);
    }
    let page = target.split('?').next().unwrap_or_default();
    match (*method, page) {
        ("GET" | "HEAD", "/metrics") => Parsed::Figures { body: *method == "GET" },
        ("GET" | "HEAD", _) => Parsed::Refused(Status::NotFound),
        _ => Parsed::Refused(Status::MethodNotAllowed),
    }
}

/// Where the empty line ends that ends a head.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let after = |mark: &[u8]| bytes.windows(mark.len()).position(|window| window == mark).map(|at| at + mark.len());
    match (after(b"\r\n\r\n"), after(b"\n\n")) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// An answer with the figures, or with only what stands before them.
pub fn answer(figures: &str, body: bool) -> Vec<u8> {
    message("200 OK", FIGURES, "", figures, body)
}

/// An answer without.
pub fn refusal(status: Status) -> Vec<u8> {
    let more = if status == Status::MethodNotAllowed { "Allow: GET, HEAD\r\n" } else { "" };
    let text = format!("{}; the figures are at /metrics\n", status.line());
    message(status.line(), "text/plain; charset=utf-8", more, &text, true)
}

fn message(status: &str, kind: &str, more: &str, text: &str, body: bool) -> Vec<u8> {
    let length = text.len();
    let text = if body { text } else { "" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Cache-Control: no-store\r\n\
         Connection: close\r\n\r\n"
    );
    [head.as_bytes(), text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        let refused = Parsed::Refused;
        for (text, parsed) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Parsed::Figures { body: true }),
            ("GET /metrics?a=b HTTP/1.0\r\n\r\n", Parsed::Figures { body: true }),
            ("GET /metrics HTTP/1.1\nHost: x\n\nmore", Parsed::Figures { body: true }),
            ("HEAD /metrics HTTP/1.1\r\n\r\n", Parsed::Figures { body: false }),
            ("", Parsed::Partial),
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n", Parsed::Partial),
            ("GET / HTTP/1.1\r\n\r\n", refused(Status::NotFound)),
            ("POST /metrics HTTP/1.1\r\n\r\n", refused(Status::MethodNotAllowed)),
            ("GET /metrics HTTP/2.0\r\n\r\n", refused(Status::Version)),
            ("GET /metrics\r\n\r\n", refused(Status::BadRequest)),
            ("GET  /metrics HTTP/1.1\r\n\r\n", refused(Status::BadRequest)),
            ("GET /metrics HTTP/1.1\r\nnonsense\r\n\r\n", refused(Status::BadRequest)),
            ("\r\n\r\n", refused(Status::BadRequest)),
        ] {
            assert_eq!(parse(text.as_bytes()), parsed, "{text:?}");
        }
        assert_eq!(parse(b"GET /\xff HTTP/1.1\r\n\r\n"), refused(Status::BadRequest));
        let long = |bytes: usize| format!("GET /metrics HTTP/1.1\r\nA: {}", "x".repeat(bytes));
        assert_eq!(parse(long(REQUEST_BYTES_MAX).as_bytes()), refused(Status::TooLarge));
        assert_eq!(parse((long(REQUEST_BYTES_MAX) + "\r\n\r\n").as_bytes()), refused(Status::TooLarge));
        assert_eq!(parse((long(1000) + "\r\n\r\n").as_bytes()), Parsed::Figures { body: true });
    }

    #[test]
    fn answers() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        let whole = text(answer("a 1\n", true));
        assert!(whole.starts_with("HTTP/1.1 200 OK\r\n") && whole.ends_with("\r\n\r\na 1\n"), "{whole}");
        assert!(
            text(answer("a 1\n", false))
                .ends_with("Content-Length: 4\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n")
        );
        assert!(text(refusal(Status::MethodNotAllowed)).contains("\r\nAllow: GET, HEAD\r\n"));
    }
}
