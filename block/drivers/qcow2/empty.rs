//! Empty: an image that gives up all that it holds, so that its disk is the backing file's again. It owns nothing but the
//! order. With no request in flight.

use super::clear::Clear;
use super::with_image;
use crate::error::{OpenError, OpenResult};
use crate::node::Node;

/// Takes all clusters out of a writable qcow2 node: everything reads as the backing file has it, or as zeroes. Snapshots
/// keep what they have.
///
/// # Errors
/// The node is no qcow2 image, cannot be written, keeps its data in a raw file of its own, or I/O failed.
pub fn make_empty(node: &Node) -> OpenResult {
    with_image(node, |image| {
        if !image.image.writable {
            return Err(OpenError::new("it is open for reading only, and so cannot be emptied"));
        }
        if image.image.geometry.raw_data {
            return Err(OpenError::new("its data is a raw image by itself, and so cannot be emptied"));
        }
        let size = node.length().next_multiple_of(image.image.geometry.cluster_size());
        image.blocking(async move |channel| {
            let emptied = match channel.clear_range(0, size, Clear::Drop).await {
                Ok(()) => channel.flush().await,
                error => error,
            };
            emptied.map_err(|e| OpenError(format!("it cannot be emptied: {e}")))
        })
    })
}
