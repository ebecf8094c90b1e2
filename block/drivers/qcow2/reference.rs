//! Reference: the backing file that an image names, changed. It owns the order of what stands behind the header in its
//! cluster; what it does not know there is kept. With no request in flight.

use super::channel::Channel;
use super::header::{EXTENSION_BACKING_FORMAT, EXTENSION_END, Header, HeaderSector};
use super::with_image;
use crate::error::{OpenError, OpenResult};
use crate::node::Node;

/// The most bytes of a name.
const NAME_BYTES_MAX: usize = 1023;

/// Has a writable qcow2 node name another backing file, with its format, or none. The node goes on with the one it has
/// open; who opens the image next gets the new one.
///
/// # Errors
/// The node is no qcow2 image, cannot be written, the name does not fit, or I/O failed; then the image may name either.
pub fn set_backing(node: &Node, backing: Option<(&str, Option<&str>)>) -> OpenResult {
    with_image(node, |image| {
        if !image.image.writable {
            return Err(OpenError::new("it is open for reading only, and so its backing file cannot be changed"));
        }
        let backing = backing.map(|(name, format)| (name.to_owned(), format.map(str::to_owned)));
        image.blocking(async move |channel| channel.set_backing(backing).await)
    })
}

impl Channel {
    async fn set_backing(&self, backing: Option<(String, Option<String>)>) -> OpenResult {
        let size = self.image.geometry.cluster_size();
        let failed = |e| OpenError(format!("the backing file cannot be changed: {e}"));
        self.flush().await.map_err(failed)?;
        let cluster = self.read_bytes(0, size).await.map_err(failed)?;
        let cluster = with_backing(&cluster, backing.as_ref())?;
        // Whoever opens it next must be able to.
        let header = Header::parse(&cluster)?;
        self.write_bytes(0, &cluster).await.map_err(failed)?;
        self.file.flush().await.map_err(failed)?;
        let mut state = self.image.lock();
        state.header.backing = header.backing;
        state.header.backing_format = header.backing_format;
        state.header_sector = HeaderSector::new(&cluster);
        Ok(())
    }
}

/// The header's cluster with another backing file.
fn with_backing(cluster: &[u8], backing: Option<&(String, Option<String>)>) -> OpenResult<Vec<u8>> {
    let number = |at: usize| cluster.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    let cut_off = || OpenError::new("the header is cut off");
    let length = if number(4) == Some(3) { number(100).ok_or_else(cut_off)? as usize } else { 72 };
    let mut header = cluster.get(..length).ok_or_else(cut_off)?.to_vec();
    let mut add = |kind: u32, data: &[u8]| {
        header.extend(kind.to_be_bytes());
        header.extend((data.len() as u32).to_be_bytes());
        header.extend(data);
        header.resize(header.len().next_multiple_of(8), 0);
    };
    if let Some((_, Some(format))) = backing {
        add(EXTENSION_BACKING_FORMAT, format.as_bytes());
    }
    let mut at = length;
    while let (Some(kind), Some(bytes)) = (number(at), number(at + 4)) {
        let data = cluster.get(at + 8..).and_then(|rest| rest.get(..bytes as usize));
        match (kind, data) {
            (EXTENSION_END, _) | (_, None) => break,
            (EXTENSION_BACKING_FORMAT, _) => {}
            (_, Some(data)) => add(kind, data),
        }
        at += 8 + (bytes as usize).next_multiple_of(8);
    }
    add(EXTENSION_END, &[]);
    let name = backing.map_or("", |(name, _)| name);
    let place = if name.is_empty() { 0 } else { header.len() as u64 };
    header.extend(name.as_bytes());
    if name.len() > NAME_BYTES_MAX || header.len() > cluster.len() {
        let most = cluster.len();
        return Err(OpenError(format!("the name of the backing file does not fit into the header's {most} bytes")));
    }
    header.resize(cluster.len(), 0);
    header[8..16].copy_from_slice(&place.to_be_bytes());
    header[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    Ok(header)
}
