//! Reference: the backing file that an image names, changed. With no request in flight.

use super::header::EXTENSION_BACKING_FORMAT;
use super::with_image;
use crate::error::{OpenError, OpenResult};
use crate::node::Node;

/// Has a writable qcow2 node name another backing file, with its format, or none. The node goes on with the one it has
/// open; who opens the image next gets the new one.
///
/// # Errors
/// The node is no qcow2 image, cannot be written, the name does not fit, or I/O failed.
pub fn set_backing(node: &Node, backing: Option<(&str, Option<&str>)>) -> OpenResult {
    with_image(node, |image| {
        if !image.image.writable {
            return Err(OpenError::new("it is open for reading only, and so its backing file cannot be changed"));
        }
        let (name, format) = backing.map_or(("", None), |(name, format)| (name, format));
        let (name, format) = (name.to_owned(), format.map(|format| format.as_bytes().to_vec()));
        image.blocking(async move |channel| {
            channel.flush().await.map_err(|e| OpenError(format!("the backing file cannot be changed: {e}")))?;
            channel
                .edit_header(|header| {
                    header.set_extension(EXTENSION_BACKING_FORMAT, format);
                    header.set_backing(&name);
                    Ok(())
                })
                .await
        })
    })
}
