//! The virtio-blk device model and its vhost-user transport.
