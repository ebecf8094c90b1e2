$ create -q -f qcow2 disk 4M
@ -f qcow2 -d unmap disk
write -P 1 0 1M
discard 0 128k
read -P 0 0 128k
read -P 1 128k 896k
map
discard 130k 1k
read -P 1 130k 1k
