$ create -q -f qcow2 disk 4M
@ -f qcow2 -d unmap disk
write -P 9 0 1M
map
write -z -u 0 512k
read -P 0 0 512k
read -P 9 512k 512k
write -z -n 1M 64k
read -P 0 1M 64k
