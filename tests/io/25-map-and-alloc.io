$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
map
write 0 64k
write 1M 128k
map
alloc 0
alloc 0 128k
alloc 1M 1M
alloc 2M 64k
alloc 512k 64k
alloc 4M 1
