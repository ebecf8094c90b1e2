$ create -q -f qcow2 -o cluster_size=512,refcount_bits=1 disk 1M
@ -f qcow2 disk
write -P 1 100 100k
read -P 1 100 100k
write -z 1k 50k
read -P 0 1k 50k
map
alloc 0 1M
