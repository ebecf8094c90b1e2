$ create -q -f qcow2 -o compat=0.10,cluster_size=4k disk 64M
@ -f qcow2 disk
info
i
